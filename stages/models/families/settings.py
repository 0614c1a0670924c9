"""The settings of a config.json in every usual spelling, read into the fields of a `ModelSpec` beside its tensors."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from ..errors import ModelError
from ..spec import RopeSpec
from .common import read_layer_types, windows
from .config import Config
from .family import ACTIVATIONS
from .naming import Naming
from .rotary import Rotary, read_rope, read_table, stretched

T = TypeVar("T")

PARALLEL = ("use_parallel_residual", "parallel_attn")
_D_MODEL = ("hidden_size", "n_embd", "d_model")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_D_MLP = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
_CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx")
_ACTIVATION = ("hidden_act", "hidden_activation", "activation_function")
_RMS_EPS = ("rms_norm_eps",)
_LAYER_EPS = ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
_BASE = ("rope_theta", "rotary_emb_base")
_FRACTION = ("partial_rotary_factor", "rotary_pct", "rope_pct")
_TABLES = ("rope_scaling", "rope_parameters")
_WINDOW = ("sliding_window", "sliding_window_size")
_PATTERN = ("sliding_window_pattern", "_sliding_window_pattern")
_QK_NORM = ("qk_layernorm", "use_qk_norm", "qk_norm")

_BIASES: Mapping[str, tuple[str, ...]] = {
    "attention_bias": ("qkv_bias", "out_bias"),
    "qkv_bias": ("qkv_bias",),
    "use_qkv_bias": ("qkv_bias",),
    "attention_out_bias": ("out_bias",),
    "mlp_bias": ("mlp_bias",),
    "use_bias": ("qkv_bias", "out_bias", "mlp_bias"),
    "lm_head_bias": ("unembed_bias",),
}
"""Settings → the biases that they speak of."""

_NORM_TYPES: Mapping[str, str] = {
    "rms_norm": "rms",
    "rmsnorm": "rms",
    "rms": "rms",
    "layer_norm": "layer",
    "layernorm": "layer",
    "layer": "layer",
}

# Settings of one family or another that are harmless at some values only, as those families read them.
_ONLY: Mapping[str, tuple[object, ...]] = {
    "mlp_type": ("default",),
    "attention_softmax_in_fp32": (True,),
    "scale_attention_softmax_in_fp32": (True,),
    "reorder_and_upcast_attn": (False, True),
    "n_special": (0,),
    "predict_special_tokens": (True,),
    "alibi": (False,),
    "is_causal": (True,),
}


class Settings:
    """One config.json on its way to a `ModelSpec`: what is wrong with it is noted, not raised, and reading goes on.

    After `fields()`, `problems` holds what stands in the way, `assumed` what neither settings nor tensors tell, and
    `sized` says whether all sizes could be read.
    """

    def __init__(self, values: Mapping[str, Any], naming: Naming, where: str) -> None:
        self.problems: list[str] = []
        self.assumed: list[str] = []
        self.sized = False
        self._config = Config(values, where)
        self._values = values
        self._naming = naming
        self._where = where
        self._gemma = "gemma" in f"{values.get('model_type')} {values.get('architectures')}".lower()

    def fields(self) -> dict[str, Any]:
        """Give the fields of a `ModelSpec`; stand-ins for those that cannot be read."""
        sizes = self._sizes()
        self.sized = not self.problems
        for key, allowed in _ONLY.items():
            self._try(partial(self._config.only, key, *allowed), None)
        if self._config.take("auto_map", None) is not None:
            self.assumed.append("what its own code does beyond its settings (auto_map) is not known: it is never run")
        return {
            **sizes,
            **self._naming.norms,
            **self._norms(sizes),
            **self._positions(sizes),
            **self._windows(sizes["n_layers"]),
            **self._biases(),
            **self._attention(),
            **self._mlp(),
            **self._streams(sizes),
        }

    def _try(self, read: Callable[[], T], otherwise: T) -> T:
        """Give what can be read; note the error and give the stand-in where it cannot."""
        try:
            return read()
        except ModelError as error:
            self.problems.append(str(error))
            return otherwise

    def _spelling(self, *keys: str) -> str:
        """Give the one of several spellings that is there, or the first. Notes where two of them disagree."""
        used = [key for key in keys if self._config.take(key, None) is not None]
        for key in used[1:]:
            self._try(partial(self._config.only, key, self._config.take(used[0])), None)
        return used[0] if used else keys[0]

    def _count(self, *keys: str, stand_in: int, default: int | None = None) -> int:
        key = self._spelling(*keys)
        given = () if default is None else (default,)
        return self._try(lambda: self._config.count(key, *given), stand_in)

    def _number(self, key: str, default: float) -> float:
        return self._try(lambda: self._config.number(key, default), default)

    def _sizes(self) -> dict[str, Any]:
        naming = self._naming
        d_model, n_heads = self._count(*_D_MODEL, stand_in=1), self._count(*_HEADS, stand_in=1)
        n_kv_heads = self._count("num_key_value_heads", stand_in=n_heads, default=n_heads)
        if n_heads % n_kv_heads:
            self.problems.append(f"{n_heads} attention heads cannot share {n_kv_heads} key-value heads evenly")
        queries, fused = naming.rows("blocks.{layer}.attn.q"), naming.mates("blocks.{layer}.attn.q") > 1
        d_head = (queries or d_model) // (n_heads + 2 * n_kv_heads if queries and fused else n_heads)
        hidden = naming.rows("blocks.{layer}.mlp.up")
        d_mlp = None if hidden is None else hidden // naming.mates("blocks.{layer}.mlp.up")
        return {
            "family": str(self._values.get("model_type") or "unknown"),
            "n_layers": self._count(*_LAYERS, stand_in=naming.n_layers),
            "d_model": d_model,
            "n_heads": n_heads,
            "n_kv_heads": n_kv_heads,
            "d_head": self._count("head_dim", stand_in=1, default=max(d_head, 1)),
            "d_mlp": self._count(*_D_MLP, stand_in=1, default=d_mlp),
            "d_vocab": self._count("vocab_size", stand_in=1),
            "n_ctx": self._count(*_CONTEXT, stand_in=1),
            "gated": naming.has("blocks.{layer}.mlp.gate"),
            "learned_positions": naming.has("pos_embed"),
        }

    def _norms(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        naming = self._naming
        stems = ("ln_final", *(stem for stem in naming.layout.names if stem.startswith("blocks.{layer}.ln")))
        weighted, biased = (any(naming.has(stem, leaf) for stem in stems) for leaf in ("weight", "bias"))
        qk_norm = self._qk_norm(sizes)
        return {
            **self._norm(weighted, biased),
            "norm_weight": weighted,
            "norm_bias": biased,
            "norm_offset": 1.0 if self._gemma else 0.0,
            "norm_float32": self._gemma or not naming.norms["pre_norms"],
            "qk_norm": qk_norm,
        }

    def _norm(self, weighted: bool, biased: bool) -> dict[str, Any]:
        """Tell LayerNorm, which alone has biases, from RMSNorm, whose epsilon has a name of its own."""
        config = self._config
        if not weighted:
            self.problems.append("its norms have no weights, so that neither their kind nor their epsilon can be told")
        key = self._spelling(*_RMS_EPS, *_LAYER_EPS)
        stated = config.take(key, None) is not None
        eps = self._try(lambda: config.number(key), 1e-5) if weighted or stated else 1e-5
        kind = "layer" if biased else "rms" if key in _RMS_EPS else None
        if config.take("norm_type", None) is not None:
            named = self._try(lambda: _NORM_TYPES[config.choice("norm_type", "", _NORM_TYPES)], kind)
            if kind not in (None, named):
                self.problems.append(f"norm_type says {named!r}, but biases and the name of epsilon say {kind!r}")
            kind = named
        if weighted and stated and kind is None:
            self.problems.append(f"RMSNorm or LayerNorm cannot be told: the norms have no biases, and epsilon is {key}")
        return {"norm": kind or "layer", "norm_eps": eps}

    def _qk_norm(self, sizes: Mapping[str, Any]) -> str | None:
        width = self._naming.rows("blocks.{layer}.attn.q_norm")
        for key in _QK_NORM:
            self._try(partial(self._config.only, key, width is not None), None)
        if width is None:
            return None
        self.assumed.append("queries and keys are normalised before they are turned by their positions")
        return "full" if width == sizes["n_heads"] * sizes["d_head"] != sizes["d_head"] else "head"

    def _positions(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        nothing: dict[str, Any] = {"rope": None}
        keys = (*_BASE, *_FRACTION, *_TABLES)
        stated = any(self._config.take(key, None) is not None for key in keys)
        if not stated and self._naming.has("pos_embed"):
            return nothing
        if not stated and not any(name.endswith("rotary_emb.inv_freq") for name in self._naming.shapes):
            self.problems.append(
                f"{self._where} has neither rotary settings ({', '.join((*_BASE, *_TABLES))}) nor learned positions: "
                "how a position enters cannot be told"
            )
            return nothing
        self.assumed.append("rotary embedding turns channel i of n with channel i + n/2, as Llama's, not with i + 1")
        return self._try(lambda: self._rotations(sizes), nothing)

    def _rotations(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        config, original = self._config, "original_max_position_embeddings"
        rotary = Rotary(
            d_head=sizes["d_head"],
            n_ctx=sizes["n_ctx"],
            fraction=1.0,
            base_key=self._spelling(*_BASE),
            fraction_key=self._spelling(*_FRACTION),
            original_context=None if config.take(original, None) is None else config.count(original),
        )
        local = config.bound("rope_local_base_freq")
        table = config.take("rope_parameters", {})
        if isinstance(table, Mapping) and table.keys() & _KINDS_OF_LAYER.keys():
            return self._two_rotations(rotary)
        rope = read_rope(config, rotary)
        places = (self._values, *(config.take(key, {}) for key in _TABLES))
        if not any(place.get(key) is not None for place in places for key in _BASE):
            self.assumed.append(f"a rotary base of {rope.base:g}: there is no {_BASE[0]}")
        both = {"rope": rope, "n_ctx": stretched(sizes["n_ctx"], rope)}
        return both if local is None else {**both, "sliding_rope": RopeSpec(base=local)}

    def _two_rotations(self, rotary: Rotary) -> dict[str, Any]:
        """Read a table for layers that see everything and one for layers that slide; neither has a default."""
        tables = self._config.table("rope_parameters")
        assert tables is not None
        found = {}
        for kind, field in _KINDS_OF_LAYER.items():
            tables.take(kind)
            table = tables.table(kind)
            assert table is not None
            table.take("rope_theta")
            found[field] = read_table(table, rotary)
        tables.refuse_the_rest()
        return found

    def _windows(self, n_layers: int) -> dict[str, Any]:
        config, key = self._config, self._spelling(*_WINDOW)
        switched = config.take("use_sliding_window", None) is not None
        first = self._try(lambda: config.whole("max_window_layers", n_layers), 0) if switched else 0
        never: Callable[[int], bool] = _never
        slides = self._try(lambda: self._slides(first, stated=config.take(key, None) is not None), never)
        default = tuple(map(slides, range(n_layers)))
        sliding = self._try(lambda: read_layer_types(config, default), default)
        if any(sliding) and config.take("use_sliding_window", True) is False:
            self.problems.append(f"{self._where} has layers that slide, and says use_sliding_window = False")
        return self._try(lambda: windows(config.count(key), sliding), {}) if any(sliding) else {}

    def _slides(self, first: int, *, stated: bool) -> Callable[[int], bool]:
        """Give the rule by which layers slide where no list says it."""
        config, every = self._config, self._spelling(*_PATTERN)
        period = None if config.take(every, None) is None else config.count(every)
        if not config.flag("use_sliding_window", True) or not stated:
            return _never
        if period is not None:
            return lambda layer: (layer + 1) % period != 0
        alternates = self._gemma and self._naming.norms["post_norms"]
        if not first and config.take("layer_types", None) is None:
            which = "every other layer slides, the first one too" if alternates else "all layers slide"
            self.assumed.append(f"{which}: nothing says which do")
        return lambda layer: layer % 2 == 0 if alternates else layer >= first

    def _biases(self) -> dict[str, bool]:
        naming = self._naming
        there = {field: any(naming.has(stem, "bias") for stem in stems) for field, stems in _BIASED.items()}
        for key, fields in _BIASES.items():
            found = any(there[field] for field in fields)
            stated = self._try(partial(self._config.flag, key, found), found)
            if stated != found:
                held = "has such biases" if found else "has none"
                self.problems.append(f"{self._where} says {key} = {stated}, but the checkpoint {held}")
        return there

    def _attention(self) -> dict[str, Any]:
        config, naming = self._config, self._naming
        clip = self._try(lambda: config.bound("clip_qkv"), None)
        if clip is not None and naming.has("blocks.{layer}.attn.q_norm"):
            self.problems.append(
                f"{self._where} clips and normalises queries and keys, and nothing says which is first"
            )
        if naming.mates("blocks.{layer}.attn.q") > 1:
            order = "head by head" if naming.layout.by_head else "one below the other"
            self.assumed.append(f"the tensor of queries, keys and values holds them in this order, {order}")
        return {
            "attn_scale": self._try(self._attn_scale, None),
            "attn_scale_by_layer": self._try(lambda: config.flag("scale_attn_by_inverse_layer_idx", False), False),
            "attn_softcap": self._try(lambda: config.bound("attn_logit_softcapping"), None),
            "clip_qkv": clip,
        }

    def _attn_scale(self) -> float | None:
        config = self._config
        stated: dict[str, float] = {}
        if config.take("query_pre_attn_scalar", None) is not None:
            stated["query_pre_attn_scalar"] = config.number("query_pre_attn_scalar") ** -0.5
        if config.take("attention_multiplier", None) is not None:
            stated["attention_multiplier"] = config.number("attention_multiplier")
        if not config.flag("scale_attn_weights", True):
            stated["scale_attn_weights"] = 1.0
        if not stated and self._gemma and self._naming.norms["post_norms"]:
            self.assumed.append("attention scores are divided by √256, as there is no query_pre_attn_scalar")
            return 0.0625
        if len(stated) > 1:
            raise ModelError(f"{self._where} scales attention scores in two ways: by {' and by '.join(stated)}")
        return next(iter(stated.values()), None)

    def _mlp(self) -> dict[str, Any]:
        if self._naming.mates("blocks.{layer}.mlp.up") > 1:
            self.assumed.append("the tensor of gate and up holds the gate first")
        return {"activation": self._try(self._activation, "silu")}

    def _activation(self) -> str:
        config = self._config
        if self._gemma and config.take("hidden_activation", None) is None and not config.take("rope_parameters", None):
            config.take("hidden_act", None)
            self.assumed.append("the activation is gelu's tanh form: Gemma's old hidden_act means nothing")
            return ACTIVATIONS["gelu_pytorch_tanh"]
        key = self._spelling(*_ACTIVATION)
        return ACTIVATIONS[config.choice(key, config.take(key), ACTIVATIONS)]

    def _streams(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        config = self._config
        scaled = sizes["d_model"] ** 0.5 if self._gemma else 1.0
        self.assumed.append(
            "as Gemma's, norms have a weight of 1 + w, applied in float32, and the embedding is multiplied by √d_model"
            if self._gemma
            else "unlike Gemma's, norms have the weight that is stored, and the embedding is not multiplied by √d_model"
        )
        return {
            "parallel": self._try(self._parallel, False),
            "embed_scale": self._number("embedding_multiplier", scaled),
            "residual_scale": self._number("residual_multiplier", 1.0),
            "logit_scale": 1 / self._number("logits_scaling", 1.0),
            "logit_softcap": self._try(lambda: config.bound("final_logit_softcapping"), None),
            "tied": self._try(lambda: config.flag("tie_word_embeddings", not self._naming.has("unembed")), False),
        }

    def _parallel(self) -> bool:
        config, key = self._config, self._spelling(*PARALLEL)
        shared = self._naming.norms["shared_norm"]
        if config.take(key, None) is None and self._naming.layout.prefix == "gpt_neox.":
            raise ModelError(f"{self._where} has no {key!r}, and models with GPT-NeoX's names are of both kinds")
        parallel = config.flag(key, shared)
        if shared and not parallel:
            raise ModelError(f"{self._where} says {key} = False, but a block has one norm for attention and MLP")
        if config.take(key, None) is None:
            how = "side by side, as there is one norm for both" if parallel else "one after the other"
            self.assumed.append(f"attention and MLP run {how}")
        return parallel


def _never(layer: int) -> bool:
    return False


_BIASED: Mapping[str, tuple[str, ...]] = {
    "qkv_bias": ("blocks.{layer}.attn.q", "blocks.{layer}.attn.k", "blocks.{layer}.attn.v"),
    "out_bias": ("blocks.{layer}.attn.out",),
    "mlp_bias": ("blocks.{layer}.mlp.gate", "blocks.{layer}.mlp.up", "blocks.{layer}.mlp.down"),
    "unembed_bias": ("unembed",),
}
"""Fields of `ModelSpec` → the matrices of whose biases they speak."""
_KINDS_OF_LAYER: Mapping[str, str] = {"full_attention": "rope", "sliding_attention": "sliding_rope"}
