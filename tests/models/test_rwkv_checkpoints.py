"""One model of RWKV as a .pth file and as every folder that holds it; and whatever in a checkpoint misleads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from forebay.stages.models.errors import ModelError
from forebay.stages.models.load import load_model
from forebay.stages.models.model import Model
from forebay.stages.models.source import check_compatibility, open_checkpoint
from forebay.stages.models.spec import ModelSpec

from .rwkv_layouts import LAYOUTS, Json, Tensors, config_of, hub_6, write_folder
from .rwkv_models import random_tensors

IDS = torch.randint(0, 70, (2, 40), generator=torch.Generator().manual_seed(1))


def logits(model: Model) -> Tensor:
    return model.forward(IDS).logits


def load(path: Path) -> Model:
    return load_model(path, device="cpu")


def folder_of(layout: str, tensors: Tensors, folder: Path, **changes: object) -> Path:
    """A folder with tensors that are given in their authors' names."""
    return write_folder(folder, {**config_of(layout, tensors), **changes}, LAYOUTS[layout][1](tensors))


def pth_of(tensors: Tensors, path: Path) -> Path:
    torch.save(tensors, path)
    return path


def with_group_norm(tensors: Tensors, eps: float) -> Tensors:
    """The same model with another epsilon in the group norm, as a .pth file, which always has 64e-5, can hold it: its
    norm divides by √(variance + eps), so what enters it is multiplied instead."""
    scale = (64e-5 / eps) ** 0.5
    changed = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith("att.receptance.weight"):
            changed[name] = tensor * scale
        if name.endswith("att.r_k"):
            changed[name] = tensor / scale
    return changed


def group_norm_of(layout: str, d_head: int) -> float:
    return {"hub 6": 64e-5, "fla 6": 1e-5}.get(layout, d_head * 1e-5)


def spec_with_group_norm(spec: ModelSpec, eps: float) -> ModelSpec:
    assert spec.rwkv is not None
    return dataclasses.replace(spec, rwkv=dataclasses.replace(spec.rwkv, group_norm_eps=eps))


# ── the same model in every layout ───────────────────────────────────────────────────────────────────────────────────


def agree(layout: str, tensors: Tensors, tmp_path: Path, **changes: object) -> Model:
    """Load a folder and the .pth file of the same model, and compare what they are and what they give."""
    folder = load(folder_of(layout, tensors, tmp_path / "folder", **changes))
    eps = group_norm_of(layout, folder.spec.d_head)
    pth = load(pth_of(with_group_norm(tensors, eps), tmp_path / "model.pth"))
    assert spec_with_group_norm(folder.spec, eps) == spec_with_group_norm(pth.spec, eps)
    assert folder.spec.rwkv is not None
    assert folder.spec.rwkv.group_norm_eps == pytest.approx(eps)
    found, expected = logits(folder), logits(pth)
    assert (found - expected).norm() < 2e-6 * expected.norm()
    return folder


@pytest.mark.parametrize("d_head", [12, 16, 64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_and_a_pth_file_are_the_same_model(layout: str, d_head: int, tmp_path: Path) -> None:
    tensors = random_tensors(LAYOUTS[layout][0], d_model=2 * d_head, d_head=d_head, n_heads=2)
    model = agree(layout, tensors, tmp_path)
    assert (model.spec.n_heads, model.spec.d_head, model.spec.n_ctx) == (2, d_head, None)


@pytest.mark.parametrize("layout", ["hub 6", "fla 6"])
def test_heads_that_are_together_wider_than_the_residual_stream(layout: str, tmp_path: Path) -> None:
    tensors = random_tensors(6, d_model=36, n_heads=6, d_head=12)
    assert agree(layout, tensors, tmp_path).spec.n_heads == 6


SILENT: dict[str, tuple[str, ...]] = {
    "hub 6": ("head_size", "attention_hidden_size", "num_attention_heads", "intermediate_size", "model_version"),
    "fla 6": (
        *("expand_k", "expand_v", "num_heads", "gate_low_rank_dim", "proj_low_rank_dim"),
        *("hidden_ratio", "intermediate_size", "norm_first", "hidden_act"),
    ),
    "fla 7": (
        *("head_dim", "num_heads", "value_dim", "decay_low_rank_dim", "a_low_rank_dim", "v_low_rank_dim"),
        *("gate_low_rank_dim", "hidden_ratio", "intermediate_size", "norm_eps"),
    ),
}


@pytest.mark.parametrize("silence", [None, ...], ids=["null", "absent"])
@pytest.mark.parametrize("layout", SILENT)
def test_what_the_settings_leave_open_the_shapes_tell(layout: str, silence: object, tmp_path: Path) -> None:
    agree(layout, random_tensors(LAYOUTS[layout][0]), tmp_path, **dict.fromkeys(SILENT[layout], silence))


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("hub 6", {"num_attention_heads": 3}),  # the number of heads, not the size of one
        ("hub 6", {"rescale_every": 0}),
        ("fla 7", {"num_heads": 32}),  # wrong in published files, and nobody looks at it
        ("fla 7", {"head_dim": None}),
        ("fla 7", {"value_dim": 36}),
        ("fla 7", {"hidden_ratio": 9.0}),  # intermediate_size is what counts
    ],
    ids=str,
)
def test_settings_that_say_the_same_in_another_way(layout: str, changes: Json, tmp_path: Path) -> None:
    agree(layout, random_tensors(LAYOUTS[layout][0]), tmp_path, **changes)


@pytest.mark.parametrize("layout", ["fla 6", "fla 7"])
def test_a_ratio_makes_the_hidden_channels(layout: str, tmp_path: Path) -> None:
    tensors = random_tensors(LAYOUTS[layout][0], d_mlp=96)
    agree(layout, tensors, tmp_path, intermediate_size=None, hidden_ratio=2.5)  # 90, and up to the next 32


@pytest.mark.parametrize("layout", ["fla 6", "fla 7"])
def test_norms_without_biases(layout: str, tmp_path: Path) -> None:
    """The group norm keeps its own."""
    tensors = random_tensors(LAYOUTS[layout][0])
    biases = [name for name in tensors if "ln" in name and name.endswith("bias") and "ln_x" not in name]
    for name in biases:
        tensors[name] = torch.zeros_like(tensors[name])
    bare = {name: tensor for name, tensor in tensors.items() if name not in biases}
    folder = load(folder_of(layout, bare, tmp_path / "folder", norm_bias=False))
    pth = load(pth_of(with_group_norm(tensors, group_norm_of(layout, 12)), tmp_path / "model.pth"))
    assert len(biases) == 8
    assert pth.spec.n_parameters - folder.spec.n_parameters == 8 * 36
    assert (logits(folder) - logits(pth)).norm() < 2e-6 * logits(pth).norm()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tied_unembedding(layout: str, tmp_path: Path) -> None:
    tensors = random_tensors(LAYOUTS[layout][0])
    tensors["head.weight"] = tensors["emb.weight"]
    twice = load(folder_of(layout, tensors, tmp_path / "twice", tie_word_embeddings=True))
    untied = load(folder_of(layout, tensors, tmp_path / "untied"))
    del tensors["head.weight"]
    once = load(folder_of(layout, tensors, tmp_path / "once", tie_word_embeddings=True))
    assert once.spec.tied
    assert logits(once).equal(logits(untied))
    assert logits(twice).equal(logits(untied))
    with pytest.raises(ModelError, match=r"lacks (lm_)?head\.weight"):
        load(folder_of(layout, tensors, tmp_path / "lost"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_of_16_bits_are_the_model_of_their_rounded_weights(layout: str, tmp_path: Path) -> None:
    half = {name: tensor.bfloat16() for name, tensor in random_tensors(LAYOUTS[layout][0]).items()}
    whole = {name: tensor.float() for name, tensor in half.items()}
    stored, rounded = (load(folder_of(layout, tensors, tmp_path / str(i))) for i, tensors in enumerate((half, whole)))
    assert logits(stored).equal(logits(rounded))
    pth = [load(pth_of(tensors, tmp_path / f"{i}.pth")) for i, tensors in enumerate((half, whole))]
    assert logits(pth[0]).equal(logits(pth[1]))


def test_a_value_residual_of_layer_0_is_not_used(tmp_path: Path) -> None:
    tensors = random_tensors(7)
    with_it = tensors | {f"blocks.0.att.v{n}": tensors[f"blocks.1.att.v{n}"] for n in (0, 1, 2)}
    expected = logits(load(pth_of(tensors, tmp_path / "without.pth")))
    assert logits(load(pth_of(with_it, tmp_path / "with.pth"))).equal(expected)
    expected = logits(load(folder_of("fla 7", tensors, tmp_path / "without")))
    assert logits(load(folder_of("fla 7", with_it, tmp_path / "with"))).equal(expected)


def test_a_model_of_one_layer_has_no_value_residual(tmp_path: Path) -> None:
    tensors = random_tensors(7, n_layers=1)
    config = config_of("fla 7", tensors | {"blocks.1.att.v1": torch.zeros(36, 9)})
    folder = load(write_folder(tmp_path / "folder", config, LAYOUTS["fla 7"][1](tensors)))
    pth = load(pth_of(with_group_norm(tensors, 12e-5), tmp_path / "model.pth"))
    assert spec_with_group_norm(folder.spec, 0) == spec_with_group_norm(pth.spec, 0)
    assert (logits(folder) - logits(pth)).norm() < 2e-6 * logits(pth).norm()


def test_a_base_model_saved_alone(tmp_path: Path) -> None:
    """Its names lack the first part, which the shapes that settings leave open are found without, too."""
    tensors = random_tensors(7)
    del tensors["head.weight"]
    alone = {name.removeprefix("model."): tensor for name, tensor in LAYOUTS["fla 7"][1](tensors).items()}
    config = {**config_of("fla 7", tensors), **dict.fromkeys(SILENT["fla 7"]), "tie_word_embeddings": True}
    whole = load(folder_of("fla 7", tensors, tmp_path / "whole", tie_word_embeddings=True))
    assert logits(load(write_folder(tmp_path / "alone", config, alone))).equal(logits(whole))


# ── settings that mislead ────────────────────────────────────────────────────────────────────────────────────────────

WRONG: list[tuple[str, Json, str]] = [
    ("hub 6", {"num_attention_heads": 4}, r"num_attention_heads = 4, but forebay can take only None or 12 or 3"),
    ("hub 6", {"head_size": 18}, r"head_size = 18, so rwkv\.blocks\.0\.attention\.time_faaaa would have 18"),
    ("hub 6", {"attention_hidden_size": 48}, r"attention_hidden_size = 48, so .*receptance\.weight would have 48"),
    ("hub 6", {"intermediate_size": 126}, r"intermediate_size = 126, so .*feed_forward\.key\.weight would have 126"),
    ("hub 6", {"model_version": "5_2"}, r"model_version = '5_2'"),
    ("hub 6", {"layer_norm_epsilon": 1e-6}, r"layer_norm_epsilon = 1e-06, but forebay can take only 1e-05"),
    ("hub 6", {"head_size_divisor": 0}, r"head_size_divisor = 0"),
    ("hub 6", {"norm_bias": False}, r"settings that nothing here honours: norm_bias = False"),
    ("hub 6", {"num_hidden_layers": 4}, r"lacks rwkv\.blocks\.3\.attention"),
    ("hub 6", {"num_hidden_layers": 2}, r"holds rwkv\.blocks\.2\.attention.* which nothing here reads"),
    ("hub 6", {"vocab_size": 71}, r"holds rwkv\.embeddings\.weight of shape \(70, 36\).* \(71, 36\)"),
    ("fla 6", {"expand_k": 0.5}, r"expand_k = 0\.5, so .*k_proj\.linear\.weight would have 18"),
    ("fla 6", {"expand_k": 0.99}, r"expand_k = 0\.99, but forebay can take only a number that makes 36 times it whole"),
    ("fla 6", {"num_heads": 5}, r"num_heads = 5, so .*attn\.bonus would have 5"),
    ("fla 6", {"proj_low_rank_dim": 6}, r"proj_low_rank_dim = 6, so .*x_proj\.0\.linear\.weight would have 30"),
    ("fla 6", {"gate_low_rank_dim": 6}, r"gate_low_rank_dim = 6, so .*lora\.0\.weight would have 6"),
    ("fla 6", {"hidden_act": "swish"}, r"hidden_act = 'swish', but forebay can take only 'sqrelu'"),
    ("fla 6", {"norm_first": False}, r"norm_first = False"),
    ("fla 6", {"norm_bias": False}, r"holds model\.layers\.0\.attn_norm\.bias.* which nothing here reads"),
    ("fla 6", {"attn": {"layers": [1], "num_heads": 2}}, r"attn = \{'layers': \[1\]"),
    ("fla 6", {"hidden_ratio": 3.5, "intermediate_size": None}, r"hidden_ratio = 3\.5, so .*would have 128"),
    ("fla 6", {"gate_fn": "gelu"}, r"gate_fn = 'gelu'"),
    ("fla 7", {"head_dim": 18}, r"head_dim = 18, so model\.layers\.0\.attn\.r_k would have 18"),
    ("fla 7", {"head_dim": None, "num_heads": 4}, r"num_heads = 4, so .*r_k would have 4"),
    ("fla 7", {"value_dim": 72}, r"value_dim = 72"),
    ("fla 7", {"value_dim": [36, 36, 72]}, r"value_dim = \[36, 36, 72\]"),
    ("fla 7", {"value_dim": [36, 36]}, r"value_dim = \[36, 36\]"),
    ("fla 7", {"decay_low_rank_dim": 64}, r"decay_low_rank_dim = 64, so .*0\.attn\.w_lora\.lora\.0\.weight would have"),
    ("fla 7", {"a_low_rank_dim": 64}, r"a_low_rank_dim = 64, so .*a_lora.* but its shape is \(6, 36\)"),
    ("fla 7", {"v_low_rank_dim": 64}, r"v_low_rank_dim = 64, so model\.layers\.1\.attn\.v_lora"),
    ("fla 7", {"gate_low_rank_dim": "64"}, r"gate_low_rank_dim = '64', but forebay can take only a whole number"),
    ("fla 7", {"attn": {"layers": [0], "num_heads": 2}}, r"attn = \{'layers': \[0\]"),
    ("fla 7", {"norm_eps": 0}, r"norm_eps = 0"),
    ("fla 7", {"hidden_size": ...}, r"has no 'hidden_size'"),
    ("fla 7", {"use_rope": True}, r"settings that nothing here honours: use_rope = True"),
    ("fla 7", {"quantization_config": {"bits": 4}}, r"quantization_config = \{'bits': 4\}"),
    ("fla 7", {"model_type": "rwkv6"}, r"settings that nothing here honours: a_low_rank_dim = 6, decay_low_rank_dim"),
]


@pytest.mark.parametrize(("layout", "changes", "message"), WRONG, ids=str)
def test_a_setting_that_cannot_be_honoured_is_refused(layout: str, changes: Json, message: str, tmp_path: Path) -> None:
    folder = folder_of(layout, random_tensors(LAYOUTS[layout][0]), tmp_path / "folder", **changes)
    with pytest.raises(ModelError, match=message):
        open_checkpoint(folder)
    assert not check_compatibility(folder).compatible


def test_keys_and_values_of_different_width_are_refused_with_the_reason(tmp_path: Path) -> None:
    """As fla makes them by default."""
    tensors = random_tensors(6, n_heads=2, d_head=18)
    folder = LAYOUTS["fla 6"][1](tensors)
    for name in [name for name in folder if ".r_proj." in name or ".k_proj." in name]:
        folder[name] = folder[name][:18]
    config = config_of("fla 6", tensors)
    for changes in ({"expand_k": 0.5}, {"expand_k": ..., "expand_v": ...}):
        write_folder(tmp_path, {**config, **changes}, folder)
        with pytest.raises(ModelError, match=r"18 channels of keys and expand_v 36 of values"):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tensor_too_few_or_too_many(layout: str, tmp_path: Path) -> None:
    tensors = LAYOUTS[layout][1](random_tensors(LAYOUTS[layout][0]))
    config = config_of(layout, random_tensors(LAYOUTS[layout][0]))
    name = next(name for name in tensors if ".2." in name and ("bonus" in name or "faaaa" in name or "r_k" in name))
    write_folder(tmp_path, config, {other: tensor for other, tensor in tensors.items() if other != name})
    assert [*check_compatibility(tmp_path).tensors.missing] == [name]
    write_folder(tmp_path, config, {**tensors, f"{name}_too": torch.ones(3)})
    assert check_compatibility(tmp_path).tensors.unread == {f"{name}_too": (3,)}
    write_folder(tmp_path, config, tensors)
    assert str(check_compatibility(tmp_path)).endswith("and forebay can run it")


def test_inputs_together_in_some_layers_and_apart_in_others_are_refused(tmp_path: Path) -> None:
    tensors = random_tensors(7)
    apart, together = (LAYOUTS[layout][1](tensors) for layout in ("fla 7", "fla 7, first"))
    mixed = {name: tensor for name, tensor in apart.items() if not name.startswith("model.layers.1.")}
    mixed |= {name: tensor for name, tensor in together.items() if name.startswith("model.layers.1.")}
    with pytest.raises(ModelError, match=r"lacks model\.layers\.1\.attn\.x_"):
        open_checkpoint(write_folder(tmp_path, config_of("fla 7", tensors), mixed))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: {n.replace("time_maa", "time_mix"): v for n, v in t.items()}, "RWKV-4 and RWKV-5"),
        (lambda t: t | {"rwkv.blocks.0.attention.time_state": torch.ones(3, 12, 12)}, "states that were trained"),
        (lambda t: t | {"blocks.0.att.x": torch.ones(3)}, "RWKV as its authors publish it"),
    ],
)
def test_a_report_says_what_tensors_of_other_versions_are_known_from(
    edit: Callable[[Tensors], Tensors], said: str, tmp_path: Path
) -> None:
    tensors = random_tensors(6)
    report = check_compatibility(write_folder(tmp_path, config_of("hub 6", tensors), edit(hub_6(tensors))))
    assert not report.compatible
    assert said in "".join(report.foreign)


def test_an_unknown_model_type_with_tensors_of_rwkv_is_told_what_they_are(tmp_path: Path) -> None:
    folder = folder_of("fla 7", random_tensors(7), tmp_path / "folder", model_type="goose")
    report = check_compatibility(folder)
    assert not report.compatible
    assert any("their model_type is rwkv6 or rwkv7" in line for line in report.foreign)
