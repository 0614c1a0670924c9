"""Writes tests/dictionaries/golden/dictionary_learning: random autoencoders of every class, and what they compute.

Runs where dictionary-learning 0.1.0 is installed, on the CPU, and imports nothing of forebay:

    python tests/dictionaries/golden/write_dictionary_learning.py

One folder a case: ae.pt and config.json as its trainSAE saves them, and values.safetensors: x, the features that the
dictionary loaded by its load_dictionary gives for x, what they decode to, and what the whole gives for x.
"""

import json
import shutil
from pathlib import Path

import torch
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.utils import load_dictionary
from safetensors.torch import save_file

HERE = Path(__file__).parent / "dictionary_learning"
N_ROWS = 19

# case: class, its arguments, submodule_name, layer, io (None: config.json has no buffer)
CASES = {
    "standard": (AutoEncoder, (13, 37), "resid_post_layer_12", 12, "out"),
    "standard_unnormalized": (AutoEncoder, (7, 23), "mlp_out_layer3", 3, None),
    "standard_new": (AutoEncoderNew, (11, 31), "model.layers.4.mlp", 4, "in"),
    "gated": (GatedAutoEncoder, (9, 26), "attn_out_layer0", 0, "out"),
    "jumprelu": (JumpReluAutoEncoder, (10, 29), "resid_pre", 6, "in"),
    "topk": (AutoEncoderTopK, (12, 41, 5), "resid_post_layer_8", 8, "out"),
    "batchtopk": (BatchTopKSAE, (14, 33, 6), "resid_post_layer_3", 3, None),
    "batchtopk_untrained": (BatchTopKSAE, (8, 27, 4), "gpt_neox.layers.2", 2, "out"),
    "matryoshka": (MatryoshkaBatchTopKSAE, (15, 36, 7, [5, 11, 20]), "blocks.9.resid_post", 9, "out"),
}
# that of the top k is ignored, and larger than some of them
THRESHOLDS = {"topk": 9.0, "batchtopk": 1.75, "matryoshka": 1.75}


def randomize(ae: torch.nn.Module, case: str) -> None:
    with torch.no_grad():
        for name, parameter in ae.named_parameters():
            small = parameter.dim() == 1
            parameter.copy_(torch.randn(parameter.shape) * (0.4 if small else 1.0))
            if name in ("decoder.weight", "W_dec") and case != "standard_unnormalized":
                parameter /= parameter.norm(dim=0 if name == "decoder.weight" else 1, keepdim=True)
        if case in THRESHOLDS:
            ae.threshold.fill_(THRESHOLDS[case])


def write(case: str) -> None:
    cls, sizes, submodule, layer, io = CASES[case]
    folder = HERE / case
    folder.mkdir(parents=True)
    ae = cls(*sizes)
    randomize(ae, case)
    torch.save({name: value.cpu() for name, value in ae.state_dict().items()}, folder / "ae.pt")
    trainer = {
        "dict_class": cls.__name__,
        "activation_dim": sizes[0],
        "dict_size": sizes[1],
        "layer": layer,
        "lm_name": "EleutherAI/pythia-70m-deduped",
        "submodule_name": submodule,
        "norm_factor": 17.5,
    }
    config = {"trainer": trainer | ({"k": sizes[2]} if len(sizes) > 2 else {})}
    if io is not None:
        config["buffer"] = {"d_submodule": sizes[0], "io": io, "ctx_len": 128}
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    loaded, _ = load_dictionary(str(folder), device="cpu")
    x = torch.randn(N_ROWS, sizes[0]) * 1.5
    with torch.no_grad():
        features = loaded.encode(x)
        decoded = loaded.decode(features)
        out = loaded(x)
    save_file({"x": x, "features": features, "decoded": decoded, "out": out}, folder / "values.safetensors")


if __name__ == "__main__":
    shutil.rmtree(HERE, ignore_errors=True)
    for number, case in enumerate(CASES):
        torch.manual_seed(100 + number)
        write(case)
