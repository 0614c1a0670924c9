"""Autoencoders of dictionary_learning compute here what they compute there, class by class.

The values are those of the library's own load_dictionary and encode, by golden/write_dictionary_learning.py.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from forebay.stages.dictionaries.errors import DictionaryError
from forebay.stages.dictionaries.save import save_dictionary

from .golden_values import GOLDEN, assert_equal, assert_same_features, edit_json, one, refused, values_of

# case → its hook point and its kind of activation
CASES = {
    "standard": ("blocks.12.hook_resid_post", "relu"),
    "standard_unnormalized": ("blocks.3.mlp.hook_out", "relu"),
    "standard_new": ("blocks.4.mlp.hook_in", "relu"),
    "gated": ("blocks.0.attn.hook_out", "gated"),
    "jumprelu": ("blocks.6.hook_resid_pre", "jumprelu"),
    "topk": ("blocks.8.hook_resid_post", "topk"),
    "batchtopk": ("blocks.3.hook_resid_post", "batchtopk"),
    "batchtopk_untrained": ("blocks.2.hook_resid_post", "batchtopk"),
    "matryoshka": ("blocks.9.hook_resid_post", "batchtopk"),
}
WITH_B_IN = {"standard", "standard_unnormalized", "gated", "topk", "batchtopk", "batchtopk_untrained", "matryoshka"}


def folder_of(case: str) -> Path:
    return GOLDEN / "dictionary_learning" / case


def copy_of(case: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder_of(case), tmp_path / case))


def edit_weights(folder: Path, **changes: Tensor | None) -> None:
    """Change tensors of ae.pt; None takes one away. Dots are written as two underscores."""
    tensors = torch.load(folder / "ae.pt") | {name.replace("__", "."): value for name, value in changes.items()}
    torch.save({name: value for name, value in tensors.items() if value is not None}, folder / "ae.pt")


def edit_trainer(folder: Path, **changes: Any) -> None:
    trainer = json.loads((folder / "config.json").read_text())["trainer"] | changes
    edit_json(folder / "config.json", trainer={name: value for name, value in trainer.items() if value is not None})


@pytest.mark.parametrize("case", CASES)
def test_an_autoencoder_encodes_and_decodes_as_the_library_does(case: str) -> None:
    expected = values_of(folder_of(case))
    ae = one(folder_of(case))
    features = ae.encode(expected["x"])
    assert_same_features(features, expected["features"])
    assert_equal(ae.decode(features), expected["decoded"])
    assert_equal(ae.reconstruct(expected["x"]), expected["out"])


@pytest.mark.parametrize("case", CASES)
def test_the_configuration_says_where_it_reads_and_what_it_is(case: str) -> None:
    hook, kind = CASES[case]
    ae = one(folder_of(case))
    assert (ae.hook, ae.hook_out, ae.activation.kind) == (hook, hook, kind)
    assert (ae.b_in is not None) == (case in WITH_B_IN)
    assert ae.provenance.model == "EleutherAI/pythia-70m-deduped"
    assert ae.provenance.details["trainer"]["norm_factor"] == 17.5


def test_decoder_columns_of_an_autoencoder_get_length_one_as_the_library_makes_them() -> None:
    kept = torch.load(folder_of("standard_unnormalized") / "ae.pt")
    norms = kept["decoder.weight"].norm(dim=0)
    assert (norms - 1).abs().max() > 0.5
    ae = one(folder_of("standard_unnormalized"))
    assert_equal(ae.decoder_norms, torch.ones(ae.n_feature))
    assert_equal(ae.b_enc, kept["encoder.bias"] * norms)
    kept = torch.load(folder_of("standard") / "ae.pt")
    assert torch.equal(one(folder_of("standard")).W_enc.T, kept["encoder.weight"])


def test_an_autoencoder_topk_ignores_its_threshold() -> None:
    threshold = float(torch.load(folder_of("topk") / "ae.pt")["threshold"])
    ae = one(folder_of("topk"))
    assert ae.activation.threshold is None
    features = ae.encode(values_of(folder_of("topk"))["x"])
    assert ((features > 0) & (features < threshold)).any()


def test_batch_topk_has_one_threshold_for_all_features() -> None:
    activation = one(folder_of("matryoshka")).activation
    assert activation.threshold is not None
    assert torch.equal(activation.threshold, torch.full((36,), 1.75))
    assert activation.k == 7


def test_a_threshold_stays_float32_in_a_bfloat16_dictionary() -> None:
    ae = one(folder_of("jumprelu"), dtype=torch.bfloat16)
    assert ae.activation.threshold is not None
    assert torch.equal(ae.activation.threshold, torch.load(folder_of("jumprelu") / "ae.pt")["threshold"])
    assert ae.W_enc.dtype == torch.bfloat16


def test_weights_of_several_dtypes_lose_nothing(tmp_path: Path) -> None:
    folder = copy_of("topk", tmp_path)
    kept = torch.load(folder / "ae.pt")
    edit_weights(folder, b_dec=kept["b_dec"].bfloat16())
    ae = one(folder)
    assert torch.equal(ae.W_enc.T, kept["encoder.weight"])
    assert torch.equal(ae.b_dec, kept["b_dec"].bfloat16().float())


def test_a_topk_of_before_the_buffers_takes_k_from_its_configuration(tmp_path: Path) -> None:
    folder = copy_of("topk", tmp_path)
    edit_weights(folder, k=None, threshold=None)
    expected = values_of(folder)
    assert_same_features(one(folder).encode(expected["x"]), expected["features"])
    edit_trainer(folder, k=None)
    assert "needs k" in refused(folder)


def test_parameters_that_require_gradients_are_read_as_tensors(tmp_path: Path) -> None:
    folder = copy_of("standard_new", tmp_path)
    state = {name: torch.nn.Parameter(value) for name, value in torch.load(folder / "ae.pt").items()}
    torch.save(state, folder / "ae.pt")
    assert not one(folder).W_enc.requires_grad


# ── where it reads ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "layer", "io", "hook"),
    [
        ("resid_post_layer_20", 20, "out", "blocks.20.hook_resid_post"),
        ("resid_out_layer3", None, "out", "blocks.3.hook_resid_post"),
        ("attn_out_layer1", 1, None, "blocks.1.attn.hook_out"),
        ("resid_mid_layer_7", 7, "in", "blocks.7.hook_resid_mid"),
        ("mlp_in", 2, "in", "blocks.2.mlp.hook_in"),
        ("transformer.h.5", 5, "in", "blocks.5.hook_resid_pre"),
        ("model.layers.0.self_attn", 0, "out", "blocks.0.attn.hook_out"),
        ("blocks.3.resid_pre", None, None, "blocks.3.hook_resid_pre"),
    ],
)
def test_names_of_submodules_are_hook_points(
    tmp_path: Path, name: str, layer: int | None, io: str | None, hook: str
) -> None:
    folder = copy_of("standard", tmp_path)
    edit_trainer(folder, submodule_name=name, layer=layer)
    edit_json(folder / "config.json", buffer={"io": io} if io else None)
    assert one(folder).hook == hook


@pytest.mark.parametrize(
    ("name", "layer", "io"),
    [
        ("resid_post_layer_3", 4, "out"),
        ("resid_post_layer_3", 3, "in"),
        ("resid_pre_layer_3", 3, "out"),
        ("blocks.2.resid_post_layer_3", None, "out"),
    ],
)
def test_a_name_that_contradicts_the_layer_or_the_side_is_refused(
    tmp_path: Path, name: str, layer: int | None, io: str
) -> None:
    folder = copy_of("standard", tmp_path)
    edit_trainer(folder, submodule_name=name, layer=layer)
    edit_json(folder / "config.json", buffer={"io": io})
    assert "contradict each other" in refused(folder)
    assert one(folder, hook="blocks.9.hook_resid_mid").hook_out == "blocks.9.hook_resid_mid"


@pytest.mark.parametrize("name", [None, "embed", "resid_post", "everything"])
def test_a_name_that_says_no_hook_point_asks_for_it(tmp_path: Path, name: str | None) -> None:
    folder = copy_of("standard", tmp_path)
    edit_trainer(folder, submodule_name=name, layer=None)
    assert 'hook="blocks.' in refused(folder)
    assert one(folder, hook="hook_embed").hook == "hook_embed"


def test_a_transcoder_asks_for_both_hooks(tmp_path: Path) -> None:
    folder = copy_of("standard", tmp_path)
    edit_json(folder / "config.json", buffer={"io": "in_and_out"})
    assert "hook_out=" in refused(folder)
    assert "hook_out=" in refused(folder, hook="blocks.1.mlp.hook_in")
    given = one(folder, hook="blocks.1.mlp.hook_in", hook_out="blocks.1.mlp.hook_out")
    assert (given.hook, given.hook_out) == ("blocks.1.mlp.hook_in", "blocks.1.mlp.hook_out")


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_unknown_class_is_refused_with_the_nearest(tmp_path: Path) -> None:
    folder = copy_of("topk", tmp_path)
    edit_trainer(folder, dict_class="AutoEncoderTopk")
    assert "Did you mean 'AutoEncoderTopK'?" in refused(folder)


@pytest.mark.parametrize(
    ("case", "changes", "says"),
    [
        ("topk", {"decoder__weight": None}, "has no decoder.weight"),
        ("topk", {"codebook": torch.ones(3)}, "codebook, which this format does not know"),
        ("batchtopk", {"threshold": None}, "has no threshold"),
        ("batchtopk", {"threshold": torch.ones(2)}, "threshold has shape (2,); one number"),
        ("batchtopk", {"k": torch.tensor(9)}, "k is 6 and 9"),
        ("matryoshka", {"group_sizes": torch.tensor([5, 11])}, "groups of [5, 11] features do not make 36"),
        ("gated", {"r_mag": torch.ones(25)}, "r_mag has shape (25,); (26,)"),
        ("standard", {"bias": torch.ones(12)}, "has shape (12,)"),
        ("jumprelu", {"W_enc": torch.full((10, 29), torch.nan)}, "W_enc has 290 values that are NaN"),
        ("jumprelu", {"b_dec": torch.ones(10, dtype=torch.int64)}, "b_dec is torch.int64"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    tmp_path: Path, case: str, changes: dict[str, Tensor | None], says: str
) -> None:
    folder = copy_of(case, tmp_path)
    edit_weights(folder, **changes)
    assert says in refused(folder)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path) -> None:
    folder = copy_of("standard", tmp_path)
    torch.save({"bias": Payload(tmp_path / "made")}, folder / "ae.pt")
    assert "only running code from the file could make" in refused(folder)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and nothing", b"\x80\x04."])
def test_a_file_that_is_none_of_torchs_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = copy_of("standard", tmp_path)
    (folder / "ae.pt").write_bytes(content)
    assert "ae.pt" in refused(folder)


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    folder = copy_of("standard", tmp_path)
    path = folder / "ae.pt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "ae.pt" in refused(folder)


@pytest.mark.parametrize("state", [[torch.ones(2)], {"bias": [1.0]}, torch.ones(3)])
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, state: object) -> None:
    folder = copy_of("standard", tmp_path)
    torch.save(state, folder / "ae.pt")
    assert "no state dict" in refused(folder)


def test_a_missing_configuration_is_named(tmp_path: Path) -> None:
    folder = copy_of("standard", tmp_path)
    (folder / "config.json").unlink()
    assert "has no config.json" in refused(folder)
    (folder / "config.json").write_text('{"trainer": 3}')
    assert "no table 'trainer'" in refused(folder)


def test_it_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(DictionaryError, match="are not written as 'dictionary-learning'"):
        save_dictionary(one(folder_of("standard")), tmp_path / "out", format="dictionary-learning")
