"""Writes tests/dictionaries/golden/{gemma_scope,gemma_scope_2,llama_scope}: small random dictionaries in these layouts,
and what SAELens' own loaders make of them, with downloads from the hub turned to the files made here.

Runs where sae-lens 6.54.12 is installed (`pip install sae-lens==6.54.12`), on the CPU, and imports nothing of forebay:

    python tests/dictionaries/golden/write_scopes.py

Beside the files of each dictionary lies golden.safetensors: x, the features of x, what the dictionary gives for x.
"""

import itertools
import json
import math
import warnings
from pathlib import Path

import numpy as np
import torch
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as loaders
from safetensors import safe_open
from safetensors.torch import save_file

warnings.filterwarnings("ignore")
HERE = Path(__file__).parent
ROWS = (2, 5)
SIZES = itertools.cycle([(7, 24), (11, 29), (9, 26), (13, 31), (8, 25)])
SEEDS = itertools.count(100)


class Weights:
    """Random weights of one dictionary, in the words of Gemma Scope."""

    def __init__(self, transcodes=False):
        self.random = torch.Generator().manual_seed(next(SEEDS))
        self.d_in, self.d_sae = next(SIZES)
        self.d_out = self.d_in + 3 if transcodes else self.d_in
        self.W_enc = self.randn(self.d_in, self.d_sae, scale=0.6)
        self.b_enc = self.randn(self.d_sae, scale=0.25)
        self.W_dec = self.randn(self.d_sae, self.d_out, scale=0.7)
        self.b_dec = self.randn(self.d_out, scale=0.25)
        self.threshold = self.randn(self.d_sae, scale=0.25).abs() + 0.1

    def randn(self, *shape, scale=1.0):
        return torch.randn(*shape, generator=self.random) * scale

    def inputs(self, scale=1.5):
        x = self.randn(*ROWS, self.d_in, scale=scale) + 0.6
        return x * torch.linspace(0.3, 2.5, math.prod(ROWS)).view(*ROWS, 1)


def local(root):
    """A stand-in for hf_hub_download: the repository's folder here."""

    def download(repo_id, filename, subfolder=None, **_):
        path = root / repo_id.split("/")[-1] / (subfolder or "") / filename
        if not path.exists():
            raise loaders.EntryNotFoundError(str(path))
        return str(path)

    def shapes(repo_id, filename):
        with safe_open(download(repo_id, filename), "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  no mapping

    loaders.hf_hub_download, loaders.get_safetensors_tensor_shapes = download, shapes


def keep(root, repo, folder, loader, x, overrides, factor=None):
    """What SAELens makes of the inputs, beside the files."""
    local(root)

    def convert(path, device, cfg_overrides):
        return loader(f"google/{repo}", folder, device, False, {**(cfg_overrides or {}), **overrides})[:2]

    sae = SAE.load_from_disk(folder, converter=convert, dtype="float32")
    if factor is not None:
        sae.fold_activation_norm_scaling_factor(factor)
    heads = sae.cfg.reshape_activations == "hook_z"
    with torch.no_grad():
        given = x.view(*ROWS, 1, -1) if heads else x
        features, reconstruction = sae.encode(given), sae(given)
    golden = {"x": x, "features": features, "reconstruction": reconstruction.reshape(*ROWS, -1)}
    fired = (features != 0).float().mean().item()
    assert 0.02 < fired < 0.98, fired
    metadata = sae.cfg.metadata
    said = {"hook": metadata.hook_name, "hook_out": metadata.hook_name_out or "", "model": metadata.model_name}
    save_file(golden, root / repo / folder / "golden.safetensors", metadata={"said": json.dumps(said)})


def gemma_scope():
    root = HERE / "gemma_scope"
    wanted = [
        ("gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82", False),
        ("gemma-scope-9b-it-res", "layer_9/width_131k/average_l0_14", True),
        ("gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6", False),
        ("gemma-scope-9b-pt-mlp", "layer_0/width_16k/average_l0_50", False),
        ("gemma-scope-2b-pt-att", "layer_25/width_65k/average_l0_63", False),
        ("gemma-scope-2b-pt-transcoders", "layer_7/width_16k/average_l0_70", False),
    ]
    for repo, folder, small in wanted:
        transcodes = repo.endswith("transcoders")
        weights = Weights(transcodes)
        (root / repo / folder).mkdir(parents=True, exist_ok=True)
        names = {"W_enc": "w_enc", "W_dec": "w_dec"} if small else {}
        arrays = {
            names.get(name, name): getattr(weights, name).numpy()
            for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
        }
        np.savez(root / repo / folder / "params.npz", **arrays)
        sizes = {"d_in": weights.d_in, "d_sae": weights.d_sae} | ({"d_out": weights.d_out} if transcodes else {})
        loader = loaders.gemma_2_transcoder_huggingface_loader if transcodes else loaders.gemma_2_sae_huggingface_loader
        x = weights.inputs(scale=4.0 if "embedding" in folder else 1.5)
        keep(root, repo, folder, loader, x, sizes)


def gemma_scope_2():
    root = HERE / "gemma_scope_2"
    mlp = ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output")
    wanted = [
        ("gemma-scope-2-4b-pt", "resid_post/layer_17_width_16k_l0_big", "sae", ("output",) * 2, True),
        ("gemma-scope-2-4b-pt", "attn_out/layer_9_width_16k_l0_small", "sae", ("self_attn.o_proj.input",) * 2, True),
        ("gemma-scope-2-1b-it", "mlp_out_all/layer_0_width_262k_l0_medium", "sae", mlp[1:] * 2, False),
        ("gemma-scope-2-1b-it", "transcoder_all/layer_5_width_16k_l0_big", "transcoder", mlp, True),
        ("gemma-scope-2-270m-pt", "transcoder/layer_12_width_16k_l0_small_affine", "transcoder", mlp, True),
    ]
    for repo, folder, kind, places, configured in wanted:
        weights = Weights(kind == "transcoder")
        path = root / repo / folder
        path.mkdir(parents=True, exist_ok=True)
        tensors = {name.lower(): getattr(weights, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
        layer = folder.split("layer_")[1].split("_")[0]
        if "affine" in folder:
            tensors["affine_skip_connection"] = weights.randn(weights.d_in, weights.d_out, scale=0.4)
        save_file(tensors, path / "params.safetensors")
        if configured:
            config = {
                "hf_hook_point_in": f"model.layers.{layer}.{places[0]}",
                "hf_hook_point_out": f"model.layers.{layer}.{places[1]}",
                "width": weights.d_sae,
                "model_name": {"gemma-scope-2-270m-pt": "gemma-v3-270m-pt"}.get(repo, repo.replace("scope-2", "3")),
                "architecture": "jump_relu",
                "l0": 60,
                "affine_connection": "affine" in folder,
                "type": kind,
            }
            (path / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        keep(root, repo, folder, loaders.gemma_3_sae_huggingface_loader, weights.inputs(), {})


def llama_scope():
    root = HERE / "llama_scope"
    weights = Weights()
    weights.W_dec /= weights.W_dec.norm(dim=-1, keepdim=True)
    mean = 2.25
    factor = math.sqrt(weights.d_in) / mean
    repo, folder = "Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L15R-8x"
    (root / repo / folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    hyperparameters = {
        "device": "cuda:0",
        "dtype": "torch.bfloat16",
        "hook_point_in": "blocks.15.hook_resid_post",
        "hook_point_out": "blocks.15.hook_resid_post",
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "expansion_factor": 8,
        "d_model": weights.d_in,
        "d_sae": weights.d_sae,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.52734375,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": mean, "out": mean},
        "sparsity_include_decoder_norm": True,
        "use_glu_encoder": False,
        "top_k": 50,
    }
    (root / repo / folder / "hyperparams.json").write_text(json.dumps(hyperparameters, indent=1) + "\n")
    tensors = _openmoss(weights)
    save_file(tensors, root / repo / folder / "checkpoints" / "final.safetensors")
    keep(root, repo, folder, loaders.llama_scope_sae_huggingface_loader, weights.inputs(), {}, factor)

    weights = Weights()
    weights.d_sae = 3 * weights.d_in
    weights.W_enc, weights.b_enc = weights.randn(weights.d_in, weights.d_sae, scale=0.6), weights.randn(weights.d_sae)
    weights.W_dec = weights.randn(weights.d_sae, weights.d_in)
    weights.W_dec /= weights.W_dec.norm(dim=-1, keepdim=True)
    repo, folder = "Llama-Scope-R1-Distill", "400M-Slimpajama-400M-OpenR1-Math-220k/L7R"
    (root / repo / folder).mkdir(parents=True, exist_ok=True)
    hook = "blocks.7.hook_resid_post"
    config = {
        "sae_type": "sae",
        "hook_point_in": hook,
        "hook_point_out": hook,
        "d_model": weights.d_in,
        "expansion_factor": 3,
        "act_fn": "jumprelu",
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True,
        "top_k": 50,
    }
    (root / repo / folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tensors = _openmoss(weights) | {
        "log_jumprelu_threshold": weights.randn(weights.d_sae, scale=0.5) - 0.5,
        f"dataset_average_activation_norm.{hook}": torch.tensor(4.5),
    }
    save_file(tensors, root / repo / folder / "sae_weights.safetensors")
    factor = math.sqrt(weights.d_in) / 4.5
    keep(root, repo, folder, loaders.llama_scope_r1_distill_sae_huggingface_loader, weights.inputs(), {}, factor)


def _openmoss(weights):
    return {
        "encoder.weight": weights.W_enc.T.contiguous(),
        "encoder.bias": weights.b_enc,
        "decoder.weight": weights.W_dec.T.contiguous(),
        "decoder.bias": weights.b_dec,
    }


if __name__ == "__main__":
    gemma_scope()
    gemma_scope_2()
    llama_scope()
    folders = ("gemma_scope", "gemma_scope_2", "llama_scope")
    files = [path for name in folders for path in (HERE / name).rglob("*") if path.is_file()]
    print(len(files), "files,", sum(path.stat().st_size for path in files), "bytes")
