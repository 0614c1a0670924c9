"""Writes tests/dictionaries/golden/sparsify: small random coders that sparsify saves, and what it makes of inputs.

Runs where sparsify 1.3.3 is installed (`pip install eai-sparsify==1.3.3`), on the CPU, and imports nothing of forebay:

    python tests/dictionaries/golden/write_sparsify.py

One folder a case: the coder, in a folder named after its hookpoint, and values.safetensors: x, the features of x
(dense), what they decode to, and what the whole coder gives for x, with its skip connection.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from sparsify import SparseCoder, SparseCoderConfig

HERE = Path(__file__).parent / "sparsify"

TRAINING = {"normalize_decoder": False, "multi_topk": True}

# case: hookpoint, d_in, what the configuration says
CASES = {
    "topk": ("layers.10", 13, {"num_latents": 37, "k": 5}),
    "expanded": ("layers.3.mlp", 11, {"expansion_factor": 3, "k": 4, **TRAINING}),
    "groupmax": ("h.2.attn", 12, {"activation": "groupmax", "num_latents": 42, "k": 6}),
    "transcoder": ("layers.7.mlp", 9, {"num_latents": 29, "k": 3, "transcode": True}),
    "skip": ("layers.1.mlp", 10, {"num_latents": 31, "k": 4, "transcode": True, "skip_connection": True}),
    "skip_of_2024": ("layers.5.mlp", 8, {"num_latents": 26, "k": 2, "skip_connection": True}),
    "bfloat16": ("layers.4/seed1", 14, {"num_latents": 39, "k": 7}),
    "ties": ("layers.6", 7, {"num_latents": 34, "k": 3}),
}
N_ROWS = 17


def randomize(coder: SparseCoder, case: str) -> None:
    with torch.no_grad():
        for name, parameter in coder.named_parameters():
            scale = 0.4 if "b" in name.split(".")[-1][:1] else 1.0
            parameter.copy_(torch.randn(parameter.shape) * scale)
        if case == "ties":  # every feature has a twin that writes the same
            half = coder.num_latents // 2
            for value in (coder.encoder.weight, coder.encoder.bias, coder.W_dec):
                value[half:] = value[:half]


def write(case: str) -> None:
    hookpoint, d_in, said = CASES[case]
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    folder = HERE / case / hookpoint
    coder = SparseCoder(d_in, SparseCoderConfig(**said), dtype=dtype)
    randomize(coder, case)
    coder.save_to_disk(folder)
    if case == "skip_of_2024":  # configurations did not say `transcode`, and said `signed`
        config = json.loads((folder / "cfg.json").read_text())
        del config["transcode"], config["activation"]
        (folder / "cfg.json").write_text(json.dumps(config | {"signed": False}))
    loaded = SparseCoder.load_from_disk(folder).float()
    loaded.cfg.multi_topk = False  # with it, what a call gives is made of the 4 k features of that loss
    x = torch.randn(N_ROWS, d_in) * 1.5
    with torch.no_grad():
        encoded = loaded.encode(x)
        features = torch.zeros(N_ROWS, loaded.num_latents).scatter(1, encoded.top_indices, encoded.top_acts)
        decoded = loaded.decode(encoded.top_acts, encoded.top_indices)
        out = loaded(x).sae_out
    values = {"x": x, "features": features, "decoded": decoded, "out": out}
    save_file({name: value.contiguous() for name, value in values.items()}, HERE / case / "values.safetensors")


if __name__ == "__main__":
    shutil.rmtree(HERE, ignore_errors=True)
    for number, case in enumerate(CASES):
        torch.manual_seed(number)
        write(case)
