"""Writes tests/dictionaries/golden/circuit_tracer: small random sets of transcoders, and what circuit-tracer computes.

Runs where circuit-tracer 0.5.0 is installed, on the CPU, and imports nothing of forebay:

    python tests/dictionaries/golden/write_circuit_tracer.py

One folder a case: the set, saved by circuit-tracer where it can save it, and values.safetensors: x [layer, row, d_in],
features [layer, row, feature], and `out` [layer, row, d_out], the reconstruction at every layer.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from circuit_tracer.transcoder.activation_functions import JumpReLU, TopK
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder, load_clt
from circuit_tracer.transcoder.single_layer_transcoder import (
    SingleLayerTranscoder,
    TranscoderSet,
    load_gemma_scope_2_transcoder,
    load_gemma_scope_transcoder,
    load_relu_transcoder,
)
from safetensors.torch import save_file

HERE = Path(__file__).parent / "circuit_tracer"
CPU = torch.device("cpu")
N_ROWS = 11

PER_LAYER = {"model_name": "meta-llama/Llama-3.2-1B", "model_kind": "transcoder_set"}
CROSS_LAYER = {"model_name": "google/gemma-2-2b", "model_kind": "cross_layer_transcoder"}


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.4 if "b_" in name else 1.0))
            if "threshold" in name:
                parameter.abs_()
    return module


def put(folder: Path, config: dict, x: torch.Tensor, features: torch.Tensor, out: torch.Tensor) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    values = {"x": x, "features": features, "out": out}
    save_file({name: value.contiguous() for name, value in values.items()}, folder / "values.safetensors")


def evaluated(transcoders: list[SingleLayerTranscoder], d: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made = TranscoderSet(dict(enumerate(transcoders)), "hook_resid_mid", "hook_mlp_out")
    x = torch.randn(len(transcoders), N_ROWS, d) * 1.5
    with torch.no_grad():
        features = made.encode(x)
        return x, features, made.decode(features, x)


def per_layer(
    case: str, n_layers: int, d: int, width: int, activation: Callable[[], object], *,
    skip: bool = False, dtype: torch.dtype = torch.float32, config: dict, k: int | None = None,
) -> None:  # fmt: skip
    folder = HERE / case
    made = {
        i: randomized(SingleLayerTranscoder(d, width, activation(), i, skip_connection=skip, device=CPU, dtype=dtype))
        for i in range(n_layers)
    }
    TranscoderSet(made, "", "").to_safetensors(str(folder))
    paths = [str(folder / f"layer_{i}.safetensors") for i in range(n_layers)]
    loaded = [load_relu_transcoder(path, i, CPU, torch.float32, False, False) for i, path in enumerate(paths)]
    if k is not None:  # the releases have the activation function, and no loader that chooses it
        for transcoder in loaded:
            transcoder.activation_function = TopK(k)
    put(folder, PER_LAYER | config, *evaluated(loaded, d))


def gemma_scope(case: str, n_layers: int, d: int, width: int) -> None:
    """As google/gemma-scope-2b-pt-transcoders keeps them: .npz, the encoder as [d_in, feature]."""
    folder, names = HERE / case, []
    for i in range(n_layers):
        names.append(f"layer_{i}/width_16k/average_l0_{70 - i}/params.npz")
        (folder / names[-1]).parent.mkdir(parents=True)
        sizes = {"W_enc": (d, width), "W_dec": (width, d), "b_enc": (width,), "b_dec": (d,), "threshold": (width,)}
        parts = {part: torch.randn(size).numpy() * (1.0 if len(size) > 1 else 0.4) for part, size in sizes.items()}
        np.savez(folder / names[-1], **parts | {"threshold": np.abs(parts["threshold"])})
    loaded = [load_gemma_scope_transcoder(str(folder / name), i, CPU) for i, name in enumerate(names)]
    hooks = {"feature_input_hook": "ln2.hook_normalized", "feature_output_hook": "hook_mlp_out"}
    put(folder, PER_LAYER | hooks | {"transcoders": names}, *evaluated(loaded, d))


def gemma_scope_2(case: str, n_layers: int, d: int, width: int) -> None:
    """As google/gemma-scope-2-* keeps its skip transcoders: safetensors, names in lower case, nothing transposed."""
    folder, names = HERE / case, []
    for i in range(n_layers):
        names.append(f"transcoder/layer_{i}/params.safetensors")
        (folder / names[-1]).parent.mkdir(parents=True)
        sizes = {"w_enc": (d, width), "w_dec": (width, d), "b_enc": (width,), "b_dec": (d,), "threshold": (width,)}
        sizes["affine_skip_connection"] = (d, d)
        parts = {part: torch.randn(size) * (1.0 if len(size) > 1 else 0.4) for part, size in sizes.items()}
        save_file(parts | {"threshold": parts["threshold"].abs()}, folder / names[-1])
    loaded = [load_gemma_scope_2_transcoder(str(folder / name), i, CPU) for i, name in enumerate(names)]
    hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
    put(folder, PER_LAYER | hooks | {"transcoders": names}, *evaluated(loaded, d))


def cross_layer(case: str, n_layers: int, d: int, width: int, activation: str, dtype: torch.dtype) -> None:
    folder = HERE / case
    sizes = {"activation_function": activation, "lazy_decoder": False, "device": CPU, "dtype": dtype}
    randomized(CrossLayerTranscoder(n_layers, width, d, **sizes)).to_safetensors(str(folder))
    loaded = load_clt(str(folder), device=CPU, dtype=torch.float32)
    x = torch.randn(n_layers, N_ROWS, d) * 1.5
    with torch.no_grad():
        features = loaded.encode(x)
        out = loaded.decode(features.to_sparse())
    assert out.shape == x.shape
    hooks = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
    put(folder, CROSS_LAYER | hooks, x, features, out)


def main() -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    torch.manual_seed(7)
    resid = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "mlp.hook_out"}
    mlp = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
    per_layer("relu", 3, 7, 19, lambda: F.relu, config=resid)
    per_layer("jumprelu", 2, 9, 23, lambda: JumpReLU(torch.ones(23)), config=mlp)
    per_layer("skip", 2, 8, 21, lambda: F.relu, skip=True, config=mlp | {"activation": "relu"})
    per_layer("topk", 2, 6, 25, lambda: F.relu, config=mlp | {"activation": "topk", "k": 4}, k=4)
    per_layer("bfloat16", 2, 10, 17, lambda: JumpReLU(torch.ones(17)), dtype=torch.bfloat16, config=mlp)
    gemma_scope("gemma_scope", 2, 7, 15)
    gemma_scope_2("gemma_scope_2", 2, 6, 13)
    cross_layer("clt_relu", 4, 7, 18, "relu", torch.float32)
    cross_layer("clt_jumprelu", 3, 8, 14, "jump_relu", torch.bfloat16)


if __name__ == "__main__":
    main()
