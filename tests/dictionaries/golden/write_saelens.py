"""Writes tests/dictionaries/golden/saelens: small random dictionaries that SAELens saves, and what it makes of inputs.

Runs where sae-lens 6.54.12 is installed (`pip install sae-lens==6.54.12`), on the CPU, and imports nothing of forebay:

    python tests/dictionaries/golden/write_saelens.py

`cases.json` holds the JSON files of every case's folder and how it was made; `cases.safetensors` its tensor files,
"<case>/<file>/<tensor>", and x, the features of x and what the dictionary gives for x, "<case>/golden/…".
"""

import itertools
import json
import math
import shutil
import tempfile
import warnings
from pathlib import Path

import sae_lens
import torch
from sae_lens import SAE
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening
from safetensors.torch import load_file, save_file

warnings.filterwarnings("ignore")
HERE = Path(__file__).parent
OUT = HERE / "saelens"
ROWS = (2, 5)
K = 4
FACTOR = 1.7

METADATA = {
    "model_name": "gpt2-small",
    "hook_name": "blocks.3.hook_resid_post",
    "prepend_bos": True,
    "context_size": 128,
}
NORMS = ("none", "constant_norm_rescale", "layer_norm", "expected_average_only_in", "covariance_whitening")


class Case:
    """A folder that is being made, with the sizes of its dictionary: no two of a case are equal."""

    sizes = itertools.cycle(itertools.product((7, 11, 9, 8), (24, 29, 26)))
    seeds = itertools.count(1)

    def __init__(self, name, **how):
        self.name, self.how = name, how
        self.d_in, self.d_sae = next(self.sizes)
        self.d_out = self.d_in + 3
        self.random = torch.Generator().manual_seed(next(self.seeds))
        self.folder = Path(tempfile.mkdtemp())

    def randn(self, *shape, scale=1.0):
        return torch.randn(*shape, generator=self.random) * scale

    def cfg(self, architecture, **more):
        sizes = {"d_in": self.d_in, "d_sae": self.d_sae}
        more.setdefault("metadata", {}).update({**METADATA, **more["metadata"]})
        return {"architecture": architecture, **sizes, "dtype": "float32", "device": "cpu", **more}

    def fill(self, sae):
        """Random weights, decoder rows of many lengths, biases and thresholds that matter."""
        with torch.no_grad():
            for name, parameter in sae.named_parameters():
                scale = {"W_enc": 0.6, "W_dec": 0.7, "W_skip": 0.4, "r_mag": 0.3}.get(name, 0.25)
                value = self.randn(*parameter.shape, scale=scale)
                if name == "W_dec":
                    value *= torch.linspace(0.4, 2.3, self.d_sae)[:, None]
                if name == "threshold":
                    value = value.abs() + 0.1
                parameter.copy_(value)
        return sae

    def inputs(self, heads=0):
        """Rows of very different lengths, none of mean 0."""
        x = self.randn(*ROWS, self.d_in, scale=1.5) + 0.6
        x *= torch.linspace(0.3, 2.5, math.prod(ROWS)).view(*ROWS, 1)
        return x.view(*ROWS, heads, -1) if heads else x

    def scaler(self, norm):
        """What a training checkpoint has beside the weights, and the function that folds it as SAELens does."""
        scaler = ActivationScaler()
        if norm == "expected_average_only_in":
            scaler.scaling_factor = FACTOR
        if norm == "covariance_whitening":
            mixed = (self.randn(64, self.d_in) @ self.randn(self.d_in, self.d_in) + self.randn(self.d_in)).double()
            values, vectors = torch.linalg.eigh(torch.cov(mixed.T))
            scaler.whitening = ActivationWhitening(
                mean=mixed.mean(0),
                matrix=(vectors * values.rsqrt()).contiguous(),
                inverse_matrix=(values.sqrt()[:, None] * vectors.T).contiguous(),
            )
        if scaler.scaling_factor is not None or scaler.whitening is not None:
            scaler.save(str(self.folder / "activation_scaler.json"))
        return scaler

    def fold(self, sae, scaler):
        if scaler.scaling_factor is not None:
            sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
        if scaler.whitening is not None:
            whitening = scaler.whitening
            sae.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)

    def keep(self, sae, x):
        """Add the folder, and what `sae` makes of `x`, to the golden files."""
        with torch.no_grad():
            features = sae.encode(x)
            golden = {"x": x, "features": features, "reconstruction": sae(x)}
        files = {path.name: json.loads(path.read_text()) for path in sorted(self.folder.glob("*.json"))}
        CASES[self.name] = {**self.how, "files": files}
        for path in self.folder.glob("*.safetensors"):
            for name, tensor in load_file(path).items():
                TENSORS[f"{self.name}/{path.name}/{name}"] = tensor
        for name, tensor in golden.items():
            TENSORS[f"{self.name}/golden/{name}"] = tensor.contiguous()
        fired = (features != 0).float().mean().item()
        assert 0.02 < fired < 0.98, (self.name, fired)
        assert torch.isfinite(golden["reconstruction"]).all(), self.name
        shutil.rmtree(self.folder)


CASES, TENSORS = {}, {}


def make(cfg, training=False):
    """A dictionary of SAELens, for inference or as it is while it is trained."""
    sae_class, config_class = (get_sae_training_class if training else get_sae_class)(cfg["architecture"])
    return sae_class(config_class.from_dict(cfg))


def autoencoder(name, architecture, norm, dtype="float32", **options):
    case = Case(name, architecture=architecture, norm=norm)
    k = {"k": K} if "topk" in architecture else {}
    case.fill(make(case.cfg(architecture, normalize_activations=norm, **k, **options))).save_model(case.folder)
    scaler = case.scaler(norm)
    sae = SAE.load_from_disk(case.folder, dtype=dtype)
    case.fold(sae, scaler)
    case.keep(sae, case.inputs())


def transcoder(name, architecture, norm="none"):
    case = Case(name, architecture=architecture, norm=norm)
    metadata = {"hook_name": "blocks.3.mlp.hook_in", "hook_name_out": "blocks.3.hook_mlp_out"}
    options = {"d_out": case.d_out, "apply_b_dec_to_input": False, "metadata": metadata}
    case.fill(make(case.cfg(architecture, normalize_activations=norm, **options))).save_model(case.folder)
    case.keep(SAE.load_from_disk(case.folder), case.inputs())


def checkpoint(name, architecture, norm="none", **options):
    """A checkpoint of training; what it computes is told by the inference file that SAELens makes of it."""
    case = Case(name, architecture=architecture, norm=norm)
    widths = {"matryoshka_widths": [case.d_sae // 3, case.d_sae]} if "matryoshka" in architecture else {}
    k = {"k": 4.5 if architecture == "batchtopk" else K} if "topk" in architecture else {}
    cfg = case.cfg(architecture, normalize_activations=norm, **k, **widths, **options)
    sae = case.fill(make(cfg, training=True))
    if "batchtopk" in architecture:
        sae.topk_threshold.fill_(1.3)
    sae.save_model(case.folder)
    case.fold(sae, case.scaler(norm))
    inference = Path(tempfile.mkdtemp())
    sae.save_inference_model(inference)
    case.keep(SAE.load_from_disk(inference), case.inputs())


def inference_of_batchtopk():
    case = Case("batchtopk_inference", architecture="jumprelu", norm="none")
    cfg = case.cfg("batchtopk", normalize_activations="none", k=K, rescale_acts_by_decoder_norm=True)
    sae = case.fill(make(cfg, training=True))
    sae.topk_threshold.fill_(1.3)
    sae.save_inference_model(case.folder)
    case.keep(SAE.load_from_disk(case.folder), case.inputs())


def heads():
    case = Case("hook_z", architecture="standard", norm="none")
    case.d_in = 15
    metadata = {"hook_name": "blocks.3.attn.hook_z"}
    case.fill(make(case.cfg("standard", reshape_activations="hook_z", metadata=metadata))).save_model(case.folder)
    case.keep(SAE.load_from_disk(case.folder), case.inputs(heads=3))


def old(name, said, tensors=()):
    """A folder as versions before 6 wrote it: everything in one level, other names."""
    case = Case(name, architecture=said.get("architecture", "standard"), norm="none")
    cfg = {
        "model_name": "gpt2-small",
        "hook_point": "blocks.7.hook_resid_pre",
        "hook_point_layer": 7,
        "hook_point_head_index": None,
        "dataset_path": "Skylion007/openwebtext",
        "is_dataset_tokenized": False,
        "context_size": 128,
        "d_in": case.d_in,
        "d_sae": case.d_sae,
        "expansion_factor": 4,
        "dtype": "torch.float32",
        "lr": 0.0004,
        "l1_coefficient": 8e-05,
        **said,
    }
    weights = {
        "W_enc": case.randn(case.d_in, case.d_sae, scale=0.6),
        "b_enc": case.randn(case.d_sae, scale=0.25),
        "W_dec": case.randn(case.d_sae, case.d_in, scale=0.7),
        "b_dec": case.randn(case.d_in, scale=0.25),
    }
    if "gated" in name:
        weights["b_gate"] = weights.pop("b_enc")
    for extra in tensors:
        weights[extra] = torch.ones(case.d_sae) if extra == "scaling_factor" else case.randn(case.d_sae).abs() * 0.3
    (case.folder / "cfg.json").write_text(json.dumps(cfg))
    save_file(weights, case.folder / "sae_weights.safetensors")
    sae = SAE.load_from_disk(case.folder)
    if cfg.get("normalize_activations") is True:
        (case.folder / "cfg.json").write_text(json.dumps(cfg | {"norm_scaling_factor": FACTOR}))
        sae.fold_activation_norm_scaling_factor(FACTOR)
    case.keep(sae, case.inputs(heads=0))


def ties(architecture):
    """Features in pairs that are alike in all their weights, of whole numbers, so that they tie to the last bit."""
    case = Case(f"{architecture}_ties", architecture=architecture, norm="none")
    case.d_sae = 30
    sae = make(case.cfg(architecture, k=5, apply_b_dec_to_input=False))
    with torch.no_grad():
        half = torch.randint(-3, 4, (case.d_in, 15), generator=case.random).float()
        sae.W_enc.copy_(torch.cat([half, half.flip(1)], 1))
        rows = torch.randint(-3, 4, (15, case.d_in), generator=case.random).float()
        sae.W_dec.copy_(torch.cat([rows, rows.flip(0)]))
        sae.b_dec.copy_(torch.randint(-3, 4, (case.d_in,), generator=case.random).float())
    sae.save_model(case.folder)
    x = torch.randint(-3, 4, (*ROWS, case.d_in), generator=case.random).float()
    case.keep(SAE.load_from_disk(case.folder), x)


def half_precision(name, architecture, training=False):
    """A dictionary in bfloat16, with what SAELens computes of it in float32 and in bfloat16. Sought until the same
    features fire in both.
    """
    while True:
        case = Case(name, architecture=architecture, norm="none")
        k = {"k": K} if architecture == "topk" else {}
        sae = case.fill(make(case.cfg(architecture, **k) | {"dtype": "bfloat16"}, training=training))
        sae.save_model(case.folder)
        x = case.inputs()
        with torch.no_grad():
            low = SAE.load_from_disk(case.folder)
            assert low.W_enc.dtype == torch.bfloat16
            features, reconstruction = low.encode(x), low(x)
            high = SAE.load_from_disk(case.folder, dtype="float32")
            if torch.equal(features != 0, high.encode(x) != 0):
                break
    TENSORS[f"{name}/golden/bfloat16_features"] = features
    TENSORS[f"{name}/golden/bfloat16_reconstruction"] = reconstruction
    case.keep(high, x)


def main():
    for norm in NORMS:
        for architecture in ("standard", "gated", "topk", "abstopk", "jumprelu"):
            autoencoder(f"{architecture}_{norm}", architecture, norm)
        autoencoder(f"topk_rescaled_{norm}", "topk", norm, rescale_acts_by_decoder_norm=True)
    autoencoder("abstopk_rescaled_none", "abstopk", "none", rescale_acts_by_decoder_norm=True)
    for norm in ("none", "covariance_whitening"):
        for architecture in ("standard", "gated"):
            name = f"{architecture}_without_b_dec_{norm}"
            autoencoder(name, architecture, norm, apply_b_dec_to_input=False)
    for norm in NORMS:
        checkpoint(f"batchtopk_{norm}", "batchtopk", norm, rescale_acts_by_decoder_norm=True)
    for norm in ("none", "expected_average_only_in", "covariance_whitening"):
        checkpoint(f"batchtopk_unscaled_{norm}", "batchtopk", norm, rescale_acts_by_decoder_norm=False)
    checkpoint("matryoshka_none", "matryoshka_batchtopk", rescale_acts_by_decoder_norm=True)
    checkpoint("topk_checkpoint", "topk", rescale_acts_by_decoder_norm=True)
    checkpoint("standard_checkpoint", "standard", "expected_average_only_in")
    checkpoint("jumprelu_checkpoint", "jumprelu")
    checkpoint("gated_checkpoint", "gated")
    inference_of_batchtopk()
    for norm in ("none", "constant_norm_rescale", "layer_norm"):
        transcoder(f"transcoder_{norm}", "transcoder", norm)
        transcoder(f"jumprelu_transcoder_{norm}", "jumprelu_transcoder", norm)
    transcoder("skip_transcoder_none", "skip_transcoder")
    transcoder("jumprelu_skip_transcoder_none", "jumprelu_skip_transcoder")
    heads()
    old("old_standard", {"activation_fn_str": "relu"}, ["scaling_factor"])
    old("old_without_activation", {"normalize_activations": None})
    old("old_topk", {"activation_fn": "topk", "activation_fn_kwargs": {"k": K}, "sae_lens_version": "3.20.1"})
    old("old_gated", {"architecture": "gated", "normalize_activations": False}, ["b_mag", "r_mag"])
    old("old_jumprelu", {"architecture": "jumprelu", "normalize_activations": "none"}, ["threshold"])
    old("old_averaged", {"normalize_activations": True, "apply_b_dec_to_input": False})
    old("old_layer_norm", {"normalize_activations": "layer_norm", "sae_lens_version": "5.9.0"})
    for architecture in ("topk", "abstopk"):
        ties(architecture)
    for architecture in ("standard", "topk", "jumprelu"):
        half_precision(f"{architecture}_bfloat16", architecture)
    half_precision("jumprelu_bfloat16_checkpoint", "jumprelu", training=True)

    OUT.mkdir(exist_ok=True)
    made = {"made_by": f"sae-lens {sae_lens.__version__}, torch {torch.__version__}", "cases": CASES}
    (OUT / "cases.json").write_text(json.dumps(made, indent=0, sort_keys=True) + "\n")
    save_file(TENSORS, OUT / "cases.safetensors")
    print(len(CASES), "cases,", sum(path.stat().st_size for path in OUT.iterdir()), "bytes")


if __name__ == "__main__":
    main()
