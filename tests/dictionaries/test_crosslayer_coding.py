"""Checkpoints of crosslayer-coding are read as its source says they compute, or refused with the reason.

The library is on no package index (neither as crosslayer-coding nor as clt), so that nothing here is its own output:
checkpoints are made here under its names, and compared with its formulas written out in float64.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from forebay.stages.dictionaries.activation import Sparse
from forebay.stages.dictionaries.errors import DictionaryError
from forebay.stages.dictionaries.save import save_dictionary
from forebay.stages.dictionaries.transcoders import TranscoderSet

from .golden_values import assert_equal, assert_same_features, edit_json, edit_tensors, many, refused

L, D, M, N_ROWS = 4, 7, 19, 11
Numbers = Mapping[str, NDArray[np.float64]]
CONFIG: Mapping[str, Any] = {
    "num_layers": L,
    "d_model": D,
    "num_features": M,
    "model_name": "gpt2",
    "normalization_method": "none",
    "activation_fn": "jumprelu",
    "jumprelu_threshold": 0.03,
    "batchtopk_k": None,
    "clt_dtype": None,
    "mlp_input_template": "transformer.h.{}.mlp.input",
    "mlp_output_template": "transformer.h.{}.mlp.output",
    "decoder_tying": "none",
    "enable_feature_offset": False,
    "enable_feature_scale": False,
    "skip_connection": False,
}
TYINGS = ("none", "per_source", "per_target")


def decoder_of(tying: str, layer: int, target: int) -> str:
    return {"none": f"{layer}->{target}", "per_source": f"{layer}", "per_target": f"{target}"}[tying]


def checkpoint(folder: Path, *, dtype: torch.dtype = torch.float32, scaled: bool = False, **changes: Any) -> Path:
    """A random checkpoint, of what the library's modules are called."""
    torch.manual_seed(11)
    config = {**CONFIG, **changes, "enable_feature_scale": scaled}
    tying = config["decoder_tying"]
    tensors: dict[str, Tensor] = {}
    for layer in range(L):
        tensors[f"encoder_module.encoders.{layer}.weight"] = torch.randn(M, D)
        tensors[f"encoder_module.encoders.{layer}.bias_param"] = torch.randn(M) * 0.4
    for key in {decoder_of(tying, layer, target) for layer in range(L) for target in range(layer, L)}:
        tensors[f"decoder_module.decoders.{key}.weight"] = torch.randn(D, M)
        tensors[f"decoder_module.decoders.{key}.bias_param"] = torch.randn(D) * 0.4
    if config["activation_fn"] == "jumprelu":
        tensors["theta_manager.log_threshold"] = torch.randn(L, M) * 0.3
    if scaled:
        tensors |= {f"decoder_module.feature_scale.{target}": torch.rand(M) + 0.5 for target in range(L)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.to(dtype) for name, value in tensors.items()}, folder / "clt_checkpoint_latest.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def weights_of(folder: Path) -> Numbers:
    kept = load_file(folder / "clt_checkpoint_latest.safetensors")
    return {name: value.double().numpy() for name, value in kept.items()}


def encoded(w: Numbers, x: NDArray[np.float64]) -> NDArray[np.float64]:
    """JumpReLU, x · [x > exp(log θ)], or ReLU, of x W + b: [layer, row, feature]."""
    h = np.stack(
        [
            x[layer] @ w[f"encoder_module.encoders.{layer}.weight"].T + w[f"encoder_module.encoders.{layer}.bias_param"]
            for layer in range(L)
        ]
    )
    if "theta_manager.log_threshold" in w:
        return np.where(h > np.exp(w["theta_manager.log_threshold"])[:, None], h, 0)
    return np.maximum(h, 0)


def decoded(w: Numbers, tying: str, target: int, f: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the library's decode does: tied by target, features are summed and decoded once, with one bias; otherwise
    every source layer is decoded, with the bias of its decoder.
    """
    scale = w.get(f"decoder_module.feature_scale.{target}", np.ones(M))
    if tying == "per_target":
        name = f"decoder_module.decoders.{target}"
        summed = sum((f[layer] * scale for layer in range(target + 1)), np.zeros_like(f[0]))
        return np.asarray(summed @ w[f"{name}.weight"].T + w[f"{name}.bias_param"])
    out = np.zeros((f.shape[1], D))
    for layer in range(target + 1):
        name = f"decoder_module.decoders.{decoder_of(tying, layer, target)}"
        out += (f[layer] * scale) @ w[f"{name}.weight"].T + w[f"{name}.bias_param"]
    return out


def statistics(folder: Path) -> dict[str, dict[str, dict[str, NDArray[np.float64]]]]:
    """Means and standard deviations of activations, written beside the checkpoint."""
    rng = np.random.default_rng(4)
    made = {
        str(layer): {
            side: {"mean": rng.normal(size=D) * 2, "std": rng.uniform(0.3, 3, size=D)} for side in ("inputs", "targets")
        }
        for layer in range(L)
    }
    plain = {
        layer: {side: {name: list(v) for name, v in values.items()} for side, values in sides.items()}
        for layer, sides in made.items()
    }
    (folder / "norm_stats.json").write_text(json.dumps(plain))
    return made


def inputs() -> Tensor:
    torch.manual_seed(23)
    return torch.randn(L, N_ROWS, D) * 1.5


def sparse(transcoders: TranscoderSet, x: Tensor) -> dict[int, Sparse]:
    return {layer: transcoders.encoder(layer).encode_sparse(x[layer]) for layer in range(L)}


@pytest.mark.parametrize("tying", TYINGS)
@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_a_checkpoint_computes_what_the_librarys_formulas_say(tmp_path: Path, tying: str, activation: str) -> None:
    folder = checkpoint(tmp_path / "clt", decoder_tying=tying, activation_fn=activation)
    transcoders, w, x = many(folder), weights_of(folder), inputs()
    features = encoded(w, x.double().numpy())
    for layer in range(L):
        assert transcoders.encoder(layer).activation.kind == activation
        assert_same_features(transcoders.encode(layer, x[layer]), torch.from_numpy(features[layer]).float())
        expected = torch.from_numpy(decoded(w, tying, layer, features)).float()
        assert_equal(transcoders.decode(layer, sparse(transcoders, x)), expected)


@pytest.mark.parametrize("tying", ["per_source", "per_target"])
def test_scales_of_features_are_of_the_target_and_folded_into_rows(tmp_path: Path, tying: str) -> None:
    folder = checkpoint(tmp_path / "clt", decoder_tying=tying, scaled=True)
    transcoders, w, x = many(folder), weights_of(folder), inputs()
    features = encoded(w, x.double().numpy())
    for target in range(L):
        expected = torch.from_numpy(decoded(w, tying, target, features)).float()
        assert_equal(transcoders.decode(target, sparse(transcoders, x)), expected)
    whole = transcoders.decoder_rows(1, 3)
    assert torch.equal(transcoders.decoder_rows(1, 3, [17, 4, 4]), whole[[17, 4, 4]])


@pytest.mark.parametrize("method", ["mean_std", "auto"])
def test_standardised_activations_are_folded_into_the_weights(tmp_path: Path, method: str) -> None:
    """The library reads (x − mean) / (std + 1e-6), and what it gives is standardised by the targets' statistics."""
    folder = checkpoint(tmp_path / "clt", normalization_method=method)
    stats, w, x = statistics(folder), weights_of(folder), inputs()
    standard = np.stack(
        [
            (x[layer].double().numpy() - stats[str(layer)]["inputs"]["mean"])
            / (stats[str(layer)]["inputs"]["std"] + 1e-6)
            for layer in range(L)
        ]
    )
    features = encoded(w, standard)
    transcoders = many(folder)
    for layer in range(L):
        assert_same_features(transcoders.encode(layer, x[layer]), torch.from_numpy(features[layer]).float())
        target = stats[str(layer)]["targets"]
        expected = decoded(w, "none", layer, features) * (target["std"] + 1e-6) + target["mean"]
        assert_equal(transcoders.decode(layer, sparse(transcoders, x)), torch.from_numpy(expected).float())
    assert {path.name for path in transcoders.provenance.files} >= {"norm_stats.json"}


def test_bfloat16_weights_keep_their_bits_and_thresholds_are_float32(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "clt", dtype=torch.bfloat16)
    w = weights_of(folder)
    transcoders = many(folder, dtype=torch.bfloat16)
    encoder = transcoders.encoder(2)
    assert encoder.dtype == torch.bfloat16
    assert np.array_equal(encoder.W_enc.T.double().numpy(), w["encoder_module.encoders.2.weight"])
    assert encoder.activation.threshold is not None
    expected = torch.from_numpy(np.exp(w["theta_manager.log_threshold"][2])).float()
    assert_equal(encoder.activation.threshold, expected)
    rows = transcoders.decoder_rows(1, 2, [18, 0])
    assert np.array_equal(rows.double().numpy(), w["decoder_module.decoders.1->2.weight"].T[[18, 0]])


def test_a_checkpoint_says_what_it_is(tmp_path: Path) -> None:
    transcoders = many(checkpoint(tmp_path / "clt"))
    assert transcoders.cross_layer
    assert (transcoders.n_layers, transcoders.n_features, transcoders.d_in, transcoders.d_out) == (L, (M,) * L, D, D)
    assert transcoders.hooks_in == tuple(f"blocks.{layer}.mlp.hook_in" for layer in range(L))
    assert transcoders.hooks_out == tuple(f"blocks.{layer}.mlp.hook_out" for layer in range(L))
    assert transcoders.provenance.model == "gpt2"
    assert transcoders.skip(1) is None


def test_a_checkpoint_travels_to_another_process(tmp_path: Path) -> None:
    transcoders = many(checkpoint(tmp_path / "clt"))
    arrived = pickle.loads(pickle.dumps(transcoders))  # noqa: S301  our own
    assert torch.equal(arrived.decoder_rows(0, 3), transcoders.decoder_rows(0, 3))


def test_a_checkpoint_can_be_written_as_circuit_tracer(tmp_path: Path) -> None:
    transcoders = many(checkpoint(tmp_path / "clt", decoder_tying="per_source"))
    again = many(save_dictionary(transcoders, tmp_path / "out", format="circuit-tracer"))
    x = inputs()
    for target in range(L):
        assert_equal(again.decode(target, sparse(again, x)), transcoders.decode(target, sparse(transcoders, x)))


# ── which file, which hook points ────────────────────────────────────────────────────────────────────────────────────


def test_the_latest_checkpoint_is_read_unless_another_is_named(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "clt")
    other = folder / "clt_checkpoint_500.safetensors"
    other.write_bytes((folder / "clt_checkpoint_latest.safetensors").read_bytes())
    edit_tensors(other, encoder_module__encoders__0__bias_param=torch.full((M,), 7.0))
    assert not (many(folder).encoder(0).b_enc == 7).any()
    assert bool((many(other).encoder(0).b_enc == 7).all())
    (folder / "clt_checkpoint_latest.safetensors").rename(folder / "clt_checkpoint_900.safetensors")
    assert "name one of these files" in refused(folder)


def test_a_checkpoint_of_a_distributed_run_is_one_file_in_a_folder(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "step_500")
    (folder / "clt_checkpoint_latest.safetensors").rename(folder / "model.safetensors")
    assert many(folder).n_layers == L
    (folder / "model.safetensors").rename(folder / "rank_0_model.safetensors")
    assert "merge_tp_checkpoint.py" in refused(folder)


def test_a_checkpoint_without_its_configuration_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "clt")
    (folder / "cfg.json").unlink()
    assert "there is no cfg.json beside it" in refused(folder / "clt_checkpoint_latest.safetensors")


@pytest.mark.parametrize(
    ("templates", "hook", "hook_out"),
    [
        (
            {"mlp_input_template": "model.layers.{}.mlp", "mlp_output_template": "model.layers.{}.mlp"},
            "blocks.1.mlp.hook_in",
            "blocks.1.mlp.hook_out",
        ),
        (
            {
                "mlp_input_template": None,
                "mlp_output_template": None,
                "tl_input_template": "blocks.{}.hook_resid_mid",
                "tl_output_template": "blocks.{}.hook_mlp_out",
            },
            "blocks.1.hook_resid_mid",
            "blocks.1.hook_mlp_out",
        ),
    ],
)
def test_templates_of_modules_are_hook_points(
    tmp_path: Path, templates: dict[str, Any], hook: str, hook_out: str
) -> None:
    transcoders = many(checkpoint(tmp_path / "clt", **templates))
    assert (transcoders.hooks_in[1], transcoders.hooks_out[1]) == (hook, hook_out)


@pytest.mark.parametrize(
    "templates",
    [
        {"mlp_input_template": "transformer.h.{}.ln_2.output"},
        {"mlp_input_template": None},
        {"mlp_input_template": None, "tl_input_template": "blocks.{}.ln2.hook_normalized"},
    ],
)
def test_a_template_that_is_no_hook_point_asks_for_it(tmp_path: Path, templates: dict[str, Any]) -> None:
    folder = checkpoint(tmp_path / "clt", **templates)
    assert 'hook="blocks.*.mlp.hook_in"' in refused(folder)
    given = many(folder, hook="blocks.*.mlp.hook_in")
    assert given.hooks_in[2] == "blocks.2.mlp.hook_in"


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"activation_fn": "topk"}, "activation_fn 'topk', which forebay does not reproduce: its TopK ranks"),
        ({"activation_fn": "batchtopk"}, "convert_batchtopk_to_jumprelu.py"),
        ({"activation_fn": "gelu"}, "activation_fn 'gelu', which forebay does not reproduce: it is not known"),
        ({"skip_connection": True}, "takes the inputs of all layers up to it"),
        ({"enable_feature_offset": True}, "no linear decoder"),
        ({"enable_feature_scale": True}, "versions differ in what it does"),
        ({"per_target_scale": True}, "it is of an older version"),
        ({"decoder_tying": "per_pair"}, "known are none, per_source, per_target"),
        ({"normalization_method": "sqrt_d_model"}, "how targets are scaled with it is not known"),
        ({"normalization_method": "mean_std"}, "copy norm_stats.json of their folder beside the checkpoint"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_features": 20}, "has shape (19, 7); by cfg.json it is (20, 7)"),
        ({"num_layers": 5}, "has no encoder_module.encoders.4.weight"),
        ({"activation_fn": "relu"}, "theta_manager.log_threshold, which this format does not know"),
        ({"decoder_tying": "per_target"}, "has no decoder_module.decoders.0.weight"),
    ],
)
def test_what_cannot_be_reproduced_is_refused_with_the_reason(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    folder = checkpoint(tmp_path / "clt")
    edit_json(folder / "cfg.json", **changes)
    assert says in refused(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda stats: stats.pop("2"), "no mean and std of the inputs of layer 2"),
        (lambda stats: stats["1"]["targets"].pop("std"), "no mean and std of the targets of layer 1"),
        (lambda stats: stats["1"]["inputs"]["mean"].pop(), "mean of the inputs of layer 1 is not 7 finite numbers"),
        (lambda stats: stats["0"]["inputs"].update(std=[-1.0] * D), "std of the inputs of layer 0 has negative"),
        (lambda stats: stats["0"]["inputs"].update(mean=["a"] * D), "no mean and std of the inputs of layer 0"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(tmp_path: Path, change: Any, says: str) -> None:
    folder = checkpoint(tmp_path / "clt", normalization_method="mean_std")
    statistics(folder)
    stats = json.loads((folder / "norm_stats.json").read_text())
    change(stats)
    (folder / "norm_stats.json").write_text(json.dumps(stats))
    assert says in refused(folder)


def test_numbers_that_are_not_finite_are_refused_when_they_are_read(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "clt")
    weight = torch.ones(D, M)
    weight[3, 5] = torch.inf
    path = folder / "clt_checkpoint_latest.safetensors"
    edit_tensors(path, encoder_module__encoders__1__weight=torch.full((M, D), torch.nan))
    edit_tensors(path, **{"decoder_module__decoders__0->2__weight": weight})
    transcoders = many(folder)
    with pytest.raises(DictionaryError, match=f"W_enc has {M * D} values that are NaN"):
        transcoders.encoder(1)
    with pytest.raises(DictionaryError, match=re.escape("0->2.weight has 1 values that are NaN or infinite")):
        transcoders.decoder_rows(0, 2)
    assert transcoders.decoder_rows(0, 2, [6, 4]).shape == (2, D)
