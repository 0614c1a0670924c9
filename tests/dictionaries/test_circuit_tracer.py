"""Sets of circuit-tracer compute here what they compute there, and what is written here is a set of circuit-tracer's.

The values are circuit-tracer's own, by golden/write_circuit_tracer.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from forebay.stages.dictionaries import place
from forebay.stages.dictionaries.activation import Activation, Sparse
from forebay.stages.dictionaries.dictionary import Dictionary, Provenance
from forebay.stages.dictionaries.errors import DictionaryError
from forebay.stages.dictionaries.save import save_dictionary
from forebay.stages.dictionaries.transcoders import TranscoderSet

from .golden_values import GOLDEN, assert_equal, assert_same_features, edit_tensors, many, refused, values_of

# case → kind of activation, kinds of hook points, whether there is a skip connection
PER_LAYER = {
    "relu": ("relu", "hook_resid_mid", "mlp.hook_out", False),
    "jumprelu": ("jumprelu", "mlp.hook_in", "mlp.hook_out", False),
    "skip": ("relu", "mlp.hook_in", "mlp.hook_out", True),
    "topk": ("topk", "mlp.hook_in", "mlp.hook_out", False),
    "bfloat16": ("jumprelu", "mlp.hook_in", "mlp.hook_out", False),
    "gemma_scope": ("jumprelu", "ln2.hook_normalized", "hook_mlp_out", False),
    "gemma_scope_2": ("jumprelu", "mlp.hook_in", "hook_mlp_out", True),
}
CROSS_LAYER = {
    "clt_relu": ("relu", "hook_resid_mid", "hook_mlp_out", False),
    "clt_jumprelu": ("jumprelu", "hook_resid_mid", "hook_mlp_out", False),
}
CASES = PER_LAYER | CROSS_LAYER


def folder_of(case: str) -> Path:
    return GOLDEN / "circuit_tracer" / case


def copy_of(case: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder_of(case), tmp_path / case))


def edit_config(folder: Path, **changes: Any) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text()) | changes
    said = {name: value for name, value in config.items() if value is not None}
    (folder / "config.yaml").write_text(yaml.safe_dump(said))


def sparse(features: Tensor) -> dict[int, Sparse]:
    return {layer: Sparse.from_dense(values) for layer, values in enumerate(features)}


@pytest.mark.parametrize("case", CASES)
def test_every_layer_encodes_as_circuit_tracer_does(case: str) -> None:
    expected = values_of(folder_of(case))
    transcoders = many(folder_of(case))
    for layer, x in enumerate(expected["x"]):
        assert_same_features(transcoders.encode(layer, x), expected["features"][layer])


@pytest.mark.parametrize("case", CASES)
def test_every_layer_is_reconstructed_as_circuit_tracer_does(case: str) -> None:
    expected = values_of(folder_of(case))
    transcoders = many(folder_of(case))
    features = sparse(expected["features"])
    for target, x in enumerate(expected["x"]):
        assert_equal(transcoders.decode(target, features, x), expected["out"][target])


@pytest.mark.parametrize("case", PER_LAYER)
def test_the_transcoder_of_a_layer_is_a_dictionary(case: str) -> None:
    expected = values_of(folder_of(case))
    transcoders = many(folder_of(case))
    for layer, x in enumerate(expected["x"]):
        assert_equal(transcoders.layer(layer).reconstruct(x), expected["out"][layer])


@pytest.mark.parametrize("case", CASES)
def test_the_configuration_says_what_a_set_is(case: str) -> None:
    kind, hook, hook_out, skip = CASES[case]
    transcoders = many(folder_of(case))
    layers = range(len(values_of(folder_of(case))["x"]))
    assert transcoders.n_layers == len(layers)
    assert transcoders.cross_layer == (case in CROSS_LAYER)
    assert transcoders.hooks_in == tuple(f"blocks.{layer}.{hook}" for layer in layers)
    assert transcoders.hooks_out == tuple(f"blocks.{layer}.{hook_out}" for layer in layers)
    assert [transcoders.encoder(layer).activation.kind for layer in layers] == [kind] * len(layers)
    assert (transcoders.skip(0) is not None) == skip
    assert transcoders.provenance.model in ("meta-llama/Llama-3.2-1B", "google/gemma-2-2b")


def test_thresholds_are_float32_whatever_the_dtype_and_keep_their_bits() -> None:
    kept = load_file(folder_of("clt_jumprelu") / "W_enc_1.safetensors")
    assert kept["threshold_1"].dtype == torch.bfloat16
    encoder = many(folder_of("clt_jumprelu"), dtype=torch.bfloat16).encoder(1)
    assert encoder.activation.threshold is not None
    assert torch.equal(encoder.activation.threshold, kept["threshold_1"].float())
    assert torch.equal(encoder.W_enc.T.view(torch.uint16), kept["W_enc_1"].view(torch.uint16))


def test_weights_of_several_dtypes_lose_nothing(tmp_path: Path) -> None:
    folder = copy_of("relu", tmp_path)
    kept = load_file(folder / "layer_1.safetensors")
    edit_tensors(folder / "layer_1.safetensors", b_enc=kept["b_enc"].bfloat16(), W_dec=kept["W_dec"].half())
    layer = many(folder).layer(1)
    assert torch.equal(layer.W_enc.T, kept["W_enc"])
    assert torch.equal(layer.b_enc, kept["b_enc"].bfloat16().float())
    assert torch.equal(layer.W_dec, kept["W_dec"].half().float())


def test_a_topk_of_which_too_few_are_positive_fires_less(tmp_path: Path) -> None:
    """circuit-tracer lets negative preactivations through here, the one thing in which its TopK is another."""
    transcoders = many(folder_of("topk"))
    encoder = transcoders.encoder(0)
    x = values_of(folder_of("topk"))["x"][0]
    few = Dictionary(
        W_enc=encoder.W_enc,
        b_enc=encoder.b_enc - 14,
        activation=encoder.activation,
        hook=encoder.hook,
        W_dec=torch.ones(25, 3),
        b_dec=torch.zeros(3),
        hook_out=encoder.hook,
        provenance=encoder.provenance,
    )
    features = few.encode(x)
    positive = (few.preactivations(x) > 0).sum(-1)
    assert int(positive.min()) < 4
    assert torch.equal((features > 0).sum(-1), positive.clamp(max=4))
    assert bool((features >= 0).all())


def test_a_cross_layer_folder_without_a_configuration_asks_for_hook_points(tmp_path: Path) -> None:
    """As circuit-tracer's own to_safetensors leaves it."""
    folder = copy_of("clt_relu", tmp_path)
    (folder / "config.yaml").unlink()
    assert 'hook="blocks.*.hook_resid_mid"' in refused(folder)
    given = many(folder, hook="blocks.*.hook_resid_mid", hook_out="mlp.hook_out")
    assert given.hooks_in[3] == "blocks.3.hook_resid_mid"
    assert given.hooks_out[2] == "blocks.2.mlp.hook_out"


def test_the_callers_hook_points_go_before_the_configurations() -> None:
    given = many(folder_of("relu"), hook="mlp.hook_in")
    assert given.hooks_in == ("blocks.0.mlp.hook_in", "blocks.1.mlp.hook_in", "blocks.2.mlp.hook_in")
    assert given.hooks_out[0] == "blocks.0.mlp.hook_out"
    assert "'blocks.3.mlp.hook_in'" in refused(folder_of("relu"), hook="blocks.3.mlp.hook_in")


# ── sets on the hub ──────────────────────────────────────────────────────────────────────────────────────────────────

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Puts a golden folder into the hub's cache as a repository, at main and at v1, and gives the snapshot."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def put(repo: str, case: str) -> Path:
        folder = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        for name in ("main", "v1"):
            (folder / "refs" / name).write_text(COMMIT)
        return Path(shutil.copytree(folder_of(case), folder / "snapshots" / COMMIT))

    return put


@pytest.fixture
def cached(cache: Callable[[str, str], Path]) -> Path:
    """google/gemma-scope-2b-pt-transcoders, with two small layers in it."""
    return cache("google/gemma-scope-2b-pt-transcoders", "gemma_scope")


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files that are fetched from the hub, in order."""
    names: list[str] = []
    real = place._from_hub

    def spy(repo: str, revision: str | None, folder: PurePosixPath, name: str) -> Path:
        names.append(name)
        return real(repo, revision, folder, name)

    monkeypatch.setattr(place, "_from_hub", spy)
    return names


def references() -> list[str]:
    names = yaml.safe_load((folder_of("gemma_scope") / "config.yaml").read_text())["transcoders"]
    return [f"hf://google/gemma-scope-2b-pt-transcoders/{name}" for name in names]


def curated(tmp_path: Path) -> Path:
    """A folder that holds config.yaml alone, with references for layers, as mntss/gemma-scope-transcoders is."""
    folder = tmp_path / "curated"
    folder.mkdir()
    shutil.copy(folder_of("gemma_scope") / "config.yaml", folder)
    edit_config(folder, transcoders=references())
    return folder


def test_layers_are_fetched_from_the_hub_when_they_are_needed(cached: Path, fetched: list[str], tmp_path: Path) -> None:
    transcoders = many(curated(tmp_path))
    first, second = (name.split("/", 4)[4] for name in references())
    assert set(fetched) == {first}
    expected = values_of(folder_of("gemma_scope"))
    assert_same_features(transcoders.encode(0, expected["x"][0]), expected["features"][0])
    assert set(fetched) == {first}
    assert_equal(transcoders.layer(1).reconstruct(expected["x"][1]), expected["out"][1])
    assert set(fetched) == {first, second}


def test_a_reference_may_name_a_revision(cached: Path, tmp_path: Path) -> None:
    folder = curated(tmp_path)
    edit_config(folder, transcoders=[f"{name}?revision=v1" for name in references()])
    assert many(folder).n_layers == 2
    edit_config(folder, transcoders=[f"{name}?revision=v2" for name in references()])
    assert "v2" in refused(folder)


def test_files_of_a_cross_layer_set_are_fetched_when_they_are_needed(
    cache: Callable[[str, str], Path], fetched: list[str]
) -> None:
    cache("org/clt", "clt_relu")
    expected = values_of(folder_of("clt_relu"))
    transcoders = many("org/clt")
    assert transcoders.provenance.revision == COMMIT
    assert set(fetched) == {"config.yaml", "W_enc_0.safetensors"}
    assert transcoders.decoder_rows(2, 3, [1]).shape == (1, 7)
    assert set(fetched) == {"config.yaml", "W_enc_0.safetensors", "W_dec_2.safetensors"}
    assert_equal(transcoders.decode(0, sparse(expected["features"])), expected["out"][0])
    assert "W_dec_1.safetensors" not in fetched


def test_a_layer_of_the_hub_that_does_not_fit_is_refused_when_it_is_read(cache: Callable[[str, str], Path]) -> None:
    snapshot = cache("org/clt", "clt_relu")
    edit_tensors(snapshot / "W_enc_2.safetensors", b_enc_2=torch.zeros(17), W_enc_2=torch.zeros(17, 7))
    edit_tensors(snapshot / "W_dec_1.safetensors", W_dec_1=torch.zeros(18, 2, 7))
    transcoders = many("org/clt")
    with pytest.raises(DictionaryError, match=r"b_enc_2 has shape \(17,\); \(18,\) was expected"):
        transcoders.encoder(2)
    with pytest.raises(DictionaryError, match=r"\(18, 2, 7\); \(18, 3, 7\) was expected"):
        transcoders.decoder_rows(1, 1)


def test_a_reference_that_the_repository_does_not_hold_is_named_before_anything_is_fetched(
    cached: Path, fetched: list[str], tmp_path: Path
) -> None:
    folder = curated(tmp_path)
    first, second = references()
    edit_config(folder, transcoders=[first, second.replace("layer_1", "layer_7")])
    message = refused(folder)
    assert "layer_7/width_16k" in message
    assert fetched == []


@pytest.mark.parametrize(
    "entry",
    [
        "hf://google/gemma-scope-2b-pt-transcoders/../../../../etc/passwd",
        "/etc/passwd",
        "../curated/config.yaml",
        "https://example.org/params.npz",
        {"id": "x", "layer": 0, "filepath": "y"},
        7,
    ],
)
def test_what_a_list_may_name_stays_in_its_folder_and_on_the_hub(cached: Path, tmp_path: Path, entry: object) -> None:
    folder = curated(tmp_path)
    edit_config(folder, transcoders=[entry])
    assert "which is no file of" in refused(folder)


@pytest.mark.parametrize("listed", [[], "layer_0.npz", {"a": 1}, ["hf://a/b/c"] * 1025])
def test_what_is_no_list_of_layers_is_refused(tmp_path: Path, listed: object) -> None:
    folder = curated(tmp_path)
    edit_config(folder, transcoders=listed)
    assert "no list of the files of at least one layer" in refused(folder)


def test_compressed_arrays_are_refused(tmp_path: Path) -> None:
    folder = copy_of("gemma_scope", tmp_path)
    path = next(folder.rglob("params.npz"))
    np.savez_compressed(path, **np.load(path))
    assert "is compressed; save it again with numpy.savez" in refused(folder)


def test_arrays_in_fortran_order_are_the_same_dictionary(tmp_path: Path) -> None:
    folder = copy_of("gemma_scope", tmp_path)
    for path in folder.rglob("params.npz"):
        np.savez(path, **{name: np.asfortranarray(value) for name, value in np.load(path).items()})
    there, here = many(folder_of("gemma_scope")), many(folder)
    assert torch.equal(here.encoder(1).W_enc, there.encoder(1).W_enc)
    some = [14, 3, 3, 0]
    assert torch.equal(here.decoder_rows(0, 0, some), there.decoder_rows(0, 0, some))


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("case", "name"),
    [("relu", "layer_1"), ("clt_relu", "W_enc_2"), ("clt_relu", "W_dec_0"), ("clt_relu", "W_enc_0")],
)
def test_a_missing_layer_is_refused(tmp_path: Path, case: str, name: str) -> None:
    folder = copy_of(case, tmp_path)
    (folder / f"{name}.safetensors").unlink()
    message = refused(folder)
    assert "every layer from 0 on must be there" in message
    assert f"[{name[-1]}]" in message


def test_a_set_without_files_is_refused(tmp_path: Path) -> None:
    folder = copy_of("relu", tmp_path)
    for path in folder.glob("layer_*"):
        path.unlink()
    assert "has no files layer_{i}.safetensors" in refused(folder)


@pytest.mark.parametrize(
    ("case", "file", "changes", "says"),
    [
        ("relu", "layer_2", {"W_dec": torch.zeros(7, 19)}, "W_dec has shape (7, 19); (19, 7) was expected"),
        ("relu", "layer_1", {"W_enc": torch.zeros(7, 19)}, "W_enc has shape (7, 19); (19, 7) was expected"),
        ("relu", "layer_2", {"b_dec": torch.zeros(8), "W_dec": torch.zeros(19, 8)}, "b_dec has shape (8,); (7,)"),
        ("relu", "layer_1", {"b_enc": None}, "has no b_enc"),
        ("relu", "layer_1", {"log_thresholds": torch.zeros(19)}, "log_thresholds, which this format does not know"),
        ("jumprelu", "layer_1", {"activation_function__threshold": None}, "has no activation_function.threshold"),
        ("skip", "layer_0", {"W_skip": torch.zeros(8, 9)}, "W_skip has shape (8, 9)"),
        ("clt_relu", "W_dec_1", {"W_dec_1": torch.zeros(18, 4, 7)}, "(18, 4, 7); (18, 3, 7) was expected"),
        ("clt_relu", "W_enc_3", {"b_dec_3": torch.zeros(1, 7)}, "b_dec_3 has shape (1, 7)"),
        ("clt_relu", "W_enc_0", {"W_skip_0": torch.zeros(7, 7)}, "W_skip_0, which this format does not know"),
        ("clt_jumprelu", "W_enc_2", {"threshold_2": None}, "has no threshold_2"),
    ],
)
def test_a_layer_that_does_not_fit_is_refused_when_the_set_is_opened(
    tmp_path: Path, case: str, file: str, changes: dict[str, Tensor | None], says: str
) -> None:
    folder = copy_of(case, tmp_path)
    edit_tensors(folder / f"{file}.safetensors", **changes)
    assert says in refused(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"activation": "gelu"}, "activation 'gelu' of config.yaml is not known"),
        ({"activation": ["relu"]}, "activation ['relu'] of config.yaml is not known"),
        ({"activation": "topk"}, "activation 'topk', and k is None"),
        ({"activation": "topk", "k": 0}, "and k is 0"),
        ({"activation": "jumprelu"}, "activation 'jumprelu', and layer 0 has no thresholds"),
        ({"model_kind": "transcoders"}, "Did you mean 'transcoder_set'?"),
        ({"model_kind": None}, "model_kind 'None'"),
        ({"feature_input_hook": "hook_mlp_in_"}, "Did you mean"),
        ({"feature_output_hook": 3}, "does not say at which hook points"),
    ],
)
def test_a_configuration_that_cannot_be_followed_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    folder = copy_of("relu", tmp_path)
    edit_config(folder, **changes)
    assert says in refused(folder)


def test_thresholds_beside_an_activation_that_has_none_are_refused(tmp_path: Path) -> None:
    folder = copy_of("jumprelu", tmp_path)
    edit_config(folder, activation="relu")
    assert "activation 'relu', and layer 0 has activation_function.threshold" in refused(folder)


@pytest.mark.parametrize(
    "text",
    [
        "model_kind: !!python/object/apply:os.mkdir [{made}]",
        "model_kind: !!python/name:os.system",
        "? !!python/object/new:os.mkdir [{made}]\n: 1",
        "{",
        "- a\n- b",
        "[" * 3000,
        "when: 2001-99-99",
        "model_kind: transcoder_set\n" + "# filler\n" * 200_000,
    ],
)
def test_a_configuration_that_is_no_table_of_plain_values_is_refused_and_not_run(tmp_path: Path, text: str) -> None:
    folder = copy_of("relu", tmp_path)
    (folder / "config.yaml").write_text(text.replace("{made}", str(tmp_path / "made")))
    assert "config.yaml" in refused(folder)
    assert not (tmp_path / "made").exists()


def test_numbers_that_are_not_finite_are_refused_when_they_are_read(tmp_path: Path) -> None:
    folder = copy_of("clt_relu", tmp_path)
    encoder, decoder = (load_file(folder / f"W_{part}_1.safetensors")[f"W_{part}_1"] for part in ("enc", "dec"))
    encoder[2, 3], decoder[5, 1, 2] = torch.nan, torch.inf
    edit_tensors(folder / "W_enc_1.safetensors", W_enc_1=encoder)
    edit_tensors(folder / "W_dec_1.safetensors", W_dec_1=decoder)
    transcoders = many(folder)
    with pytest.raises(DictionaryError, match="W_enc has 1 values that are NaN or infinite"):
        transcoders.encoder(1)
    with pytest.raises(DictionaryError, match="W_dec_1 has 1 values that are NaN or infinite"):
        transcoders.decoder_rows(1, 2)
    assert transcoders.decoder_rows(1, 2, [4, 6]).shape == (2, 7)


def test_thresholds_below_zero_are_refused(tmp_path: Path) -> None:
    folder = copy_of("jumprelu", tmp_path)
    edit_tensors(folder / "layer_1.safetensors", activation_function__threshold=torch.linspace(-0.1, 1, 23))
    transcoders = many(folder)
    transcoders.encoder(0)
    with pytest.raises(DictionaryError, match="layer 1 has thresholds below 0"):
        transcoders.encoder(1)


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def assert_same_set(found: TranscoderSet, expected: TranscoderSet) -> None:
    assert (found.n_features, found.hooks_in, found.hooks_out) == (
        expected.n_features, expected.hooks_in, expected.hooks_out
    )  # fmt: skip
    for layer in range(expected.n_layers):
        here, there = found.encoder(layer), expected.encoder(layer)
        assert torch.equal(here.W_enc, there.W_enc)
        assert torch.equal(here.b_enc, there.b_enc)
        assert here.activation.kind == there.activation.kind
        assert (here.activation.threshold is None) == (there.activation.threshold is None)
        if here.activation.threshold is not None and there.activation.threshold is not None:
            assert torch.equal(here.activation.threshold, there.activation.threshold)
        assert torch.equal(found.decoder_bias(layer), expected.decoder_bias(layer))
        for target in expected.targets(layer):
            assert torch.equal(found.decoder_rows(layer, target), expected.decoder_rows(layer, target))
        skip = expected.skip(layer)
        assert skip is None or torch.equal(found.skip(layer), skip)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", [case for case in CASES if case != "topk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_comes_back_bit_by_bit(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    transcoders = many(folder_of(case), dtype=dtype)
    folder = save_dictionary(transcoders, tmp_path / "out", format="circuit-tracer")
    assert_same_set(many(folder, dtype=dtype), transcoders)
    kept = load_file(next(folder.glob("*_0.safetensors")))
    assert {value.dtype for name, value in kept.items() if "threshold" not in name} == {dtype}


def test_a_set_is_written_one_layer_after_the_other(tmp_path: Path) -> None:
    """What is read of a layer is written before the next one is read; config.yaml is last, so that no half is whole."""
    transcoders = many(folder_of("clt_relu"))
    seen: list[tuple[int, int]] = []
    folder = tmp_path / "out"

    class Watching:
        def encoder(self, layer: int) -> Any:
            seen.append((layer, len(list(tmp_path.rglob("W_dec_*")))))
            assert not list(tmp_path.rglob("config.yaml"))
            return transcoders.encoder(layer)

        def decoder_rows(self, layer: int, target: int, features: slice | Tensor) -> Tensor:
            return transcoders.decoder_rows(layer, target, features)

        def decoder_bias(self, target: int) -> Tensor:
            return transcoders.decoder_bias(target)

        def skip(self, layer: int) -> None:
            return None

    watched = TranscoderSet(
        reader=Watching(),
        n_features=transcoders.n_features,
        d_in=transcoders.d_in,
        d_out=transcoders.d_out,
        hooks_in=transcoders.hooks_in,
        hooks_out=transcoders.hooks_out,
        cross_layer=True,
        provenance=transcoders.provenance,
    )
    save_dictionary(watched, folder, format="circuit-tracer")
    assert seen == [(0, 0), (0, 0), (1, 1), (2, 2), (3, 3)]
    assert (folder / "config.yaml").exists()


def a_transcoder(**changes: Any) -> Dictionary:
    """One of layer 0 that circuit-tracer can express, unless it is changed."""
    torch.manual_seed(5)
    parts: dict[str, Any] = {
        "W_enc": torch.randn(6, 15),
        "b_enc": torch.randn(15),
        "activation": Activation(kind="batchtopk", k=3, threshold=torch.linspace(-1, 2, 15)),
        "hook": "blocks.0.mlp.hook_in",
        "W_dec": torch.randn(15, 6),
        "b_dec": torch.randn(6),
        "W_skip": torch.randn(6, 6),
        "hook_out": "blocks.0.mlp.hook_out",
        "denormalize": False,
        "provenance": Provenance(source="trained here", format="forebay"),
    }
    return Dictionary(**parts | changes)


def test_a_transcoder_of_layer_0_is_written_as_the_set_of_one_layer(tmp_path: Path) -> None:
    ours = a_transcoder()
    transcoders = many(save_dictionary(ours, tmp_path / "out", format="circuit-tracer"))
    x = torch.randn(40, 6)
    assert transcoders.n_layers == 1
    assert_same_features(transcoders.encode(0, x), ours.encode(x))
    assert_equal(transcoders.layer(0).reconstruct(x), ours.reconstruct(x))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hook": "blocks.3.mlp.hook_in"}, "for every layer from 0 on; this has blocks.3.mlp.hook_in"),
        ({"hook_out": "somewhere"}, "cannot be written: no hook point is called 'somewhere'"),
        ({"activation": Activation(kind="topk", k=3)}, "this is topk"),
        ({"activation": Activation(kind="groupmax", k=3)}, "this is groupmax"),
        ({"input_norm": "layer_norm"}, "no such thing as an input norm"),
        ({"b_in": torch.ones(6)}, "no such thing as a b_in"),
        ({"head": 0}, "no such thing as one head only"),
        ({"W_dec": torch.ones(15, 5), "b_dec": torch.ones(5), "W_skip": None}, "read 6 and write 5 wide"),
    ],
)
def test_what_circuit_tracer_does_not_compute_is_not_written(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(DictionaryError) as error:
        save_dictionary(a_transcoder(**changes), tmp_path / "out", format="circuit-tracer")
    assert says in str(error.value)
    assert not (tmp_path / "out").exists()


def test_layers_with_other_numbers_of_features_are_read_and_not_written(tmp_path: Path) -> None:
    folder = copy_of("relu", tmp_path)
    edit_tensors(
        folder / "layer_1.safetensors",
        W_enc=torch.ones(4, 7),
        b_enc=torch.ones(4),
        W_dec=torch.ones(4, 7),
    )
    transcoders = many(folder)
    assert transcoders.n_features == (19, 4, 19)
    with pytest.raises(DictionaryError, match="one number of features"):
        save_dictionary(transcoders, tmp_path / "out", format="circuit-tracer")


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in PER_LAYER if case != "topk"])
def test_circuit_tracer_loads_a_written_set_and_computes_the_same(tmp_path: Path, case: str) -> None:
    theirs = pytest.importorskip("circuit_tracer.transcoder.single_layer_transcoder")
    ours = many(folder_of(case))
    folder = save_dictionary(ours, tmp_path / "out", format="circuit-tracer")
    paths = {layer: str(folder / f"layer_{layer}.safetensors") for layer in range(ours.n_layers)}
    loaded = theirs.load_transcoder_set(paths, "ours", "in", "out", torch.device("cpu"), torch.float32)
    x = torch.randn(ours.n_layers, 13, ours.d_in)
    with torch.no_grad():
        features = loaded.encode(x)
        out = loaded.decode(features, x)
    for layer in range(ours.n_layers):
        assert_same_features(ours.encode(layer, x[layer]), features[layer])
        assert_equal(ours.layer(layer).reconstruct(x[layer]), out[layer])


@pytest.mark.slow
@pytest.mark.parametrize("case", CROSS_LAYER)
def test_circuit_tracer_loads_a_written_cross_layer_set_and_computes_the_same(tmp_path: Path, case: str) -> None:
    theirs = pytest.importorskip("circuit_tracer.transcoder.cross_layer_transcoder")
    ours = many(folder_of(case))
    folder = save_dictionary(ours, tmp_path / "out", format="circuit-tracer")
    loaded = theirs.load_clt(str(folder), device=torch.device("cpu"), dtype=torch.float32)
    x = torch.randn(ours.n_layers, 13, ours.d_in)
    with torch.no_grad():
        features = loaded.encode(x)
        out = loaded.decode(features.to_sparse())
    ourselves = {layer: ours.encoder(layer).encode_sparse(x[layer]) for layer in range(ours.n_layers)}
    for layer in range(ours.n_layers):
        assert_same_features(ourselves[layer].to_dense(), features[layer])
        assert_equal(ours.decode(layer, ourselves), out[layer])
