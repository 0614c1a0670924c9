"""Reading a config.json with nothing passed over: every key is honoured, known not to matter, or refused."""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from ..errors import ModelError, nearest

# Keys that any transformers configuration may carry and that change no number of a forward pass at inference.
_ABOUT_THE_FILE = """
    _attn_implementation _attn_implementation_autoset _name_or_path _commit_hash architectures model_type
    transformers_version transformers.js_config torch_dtype dtype torchscript use_bfloat16 tf_legacy_loss
    unsloth_fixed unsloth_version tokenizer_class prefix cache_implementation
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
    use_cache return_dict output_attentions output_hidden_states chunk_size_feed_forward pretraining_tp
"""
_ABOUT_TRAINING = """
    initializer_range attention_dropout hidden_dropout embedding_dropout residual_dropout classifier_dropout
    resid_pdrop embd_pdrop attn_pdrop summary_type summary_use_proj summary_activation summary_proj_to_labels
    summary_first_dropout finetuning_task task_specific_params problem_type
    id2label label2id num_labels
"""
_ABOUT_GENERATION = """
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens remove_invalid_values return_dict_in_generate output_scores
"""
_IRRELEVANT = frozenset((_ABOUT_THE_FILE + _ABOUT_TRAINING + _ABOUT_GENERATION).split())

# Keys that are harmless at one value only: any other would ask for something that no forward here does.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "lm_head_bias": (False, None),
    "use_bidirectional_attention": (False, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "is_llama_config": (True,),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1, None),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
}

_REQUIRED = object()


class Config:
    """A config.json that remembers which of its keys were asked for, so that the rest can be refused.

    `values` is the parsed file, `where` names it in messages, `shapes` are those of the checkpoint's tensors by name,
    for families whose settings may leave to them what they tell.
    """

    def __init__(
        self, values: Mapping[str, Any], where: str, shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    ) -> None:
        self._values = values
        self._where = where
        self._shapes = shapes
        self._taken: set[str] = set()

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        """Give the value of a key; a missing one, or null, gives the default. Raises ModelError where there is none."""
        self._taken.add(key)
        value = self._values.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ModelError(f"{self._where} has no {key!r}.{nearest(key, self._values)}")
        return default

    def count(self, key: str, default: Any = _REQUIRED) -> int:
        """Give a positive whole number. Raises ModelError for anything else."""
        value = self.take(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.refusal(key, value, "a whole number above 0")
        return value

    def count_if(self, key: str) -> int | None:
        """The same, or None where there is none, or null."""
        return None if self.take(key, None) is None else self.count(key)

    def size(self, key: str, makes: int | None, tensor: str, axis: int, default: int | None = None) -> int:
        """Give the size of a tensor along an axis: what a setting makes it, what it is, or both, else the default.

        `makes` is what the setting comes to, None where it says nothing. Raises ModelError where setting and tensor
        differ, and where neither says anything and there is no default.
        """
        shape = self._shape(tensor)
        found = None if shape is None or len(shape) <= axis else shape[axis]
        if makes is not None and found is not None and makes != found:
            raise ModelError(
                f"{self._where} says {key} = {self._values[key]!r}, so {tensor} would have {makes} along axis {axis}, "
                f"but its shape is {shape}"
            )
        given = makes if makes is not None else found if found is not None else default
        if not given:
            raise ModelError(f"neither {self._where} gives {key!r}, nor a tensor {tensor} that would tell")
        return given

    def _shape(self, tensor: str) -> tuple[int, ...] | None:
        """The shape of a tensor; names in a base model that was saved alone lack their first part."""
        return self._shapes.get(tensor) or self._shapes.get(tensor.partition(".")[2])

    def whole(self, key: str, default: Any = _REQUIRED) -> int:
        """Give a whole number, 0 included. Raises ModelError for anything else."""
        value = self.take(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.refusal(key, value, "a whole number")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """Give a positive number. Raises ModelError for anything else."""
        value = self.take(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
            raise self.refusal(key, value, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Give true or false. Raises ModelError for anything else."""
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise self.refusal(key, value, "true or false")
        return value

    def choice(self, key: str, default: str, choices: Collection[str]) -> str:
        """Give one of `choices`. Raises ModelError for anything else, with the nearest."""
        value = self.take(key, default)
        if value not in choices:
            raise self.refusal(key, value, f"one of {', '.join(sorted(choices))}", nearest(str(value), choices))
        return str(value)

    def bound(self, key: str, default: float | None = None) -> float | None:
        """Give a positive number, None where there is null, the default where there is nothing. Raises ModelError for
        anything else."""
        if self.take(key, None) is None:
            return None if key in self._values else default
        return self.number(key)

    def only(self, key: str, *values: object) -> None:
        """Take a key that may be absent, or have one of a few values that change nothing. Raises ModelError else."""
        if (value := self.take(key, values[0])) not in values:
            raise self.refusal(key, value, " or ".join(map(repr, values)))

    def numbers(self, key: str) -> tuple[float, ...]:
        """Give a list of positive numbers. Raises ModelError for anything else."""
        values = self.take(key)
        wrong = not isinstance(values, list) or not all(
            isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 for value in values
        )
        if wrong or not values:
            raise self.refusal(key, values, "a list of numbers above 0")
        return tuple(map(float, values))

    def table(self, key: str) -> "Config | None":
        """Give a table inside this one, or None where it is absent or null. Raises ModelError for anything else."""
        value = self.take(key, None)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.refusal(key, value, "a table")
        return Config(value, f"{key} of {self._where}")

    def refusal(self, key: str, value: object, expected: str, hint: str = "") -> ModelError:
        """Give the error for a value that cannot be used."""
        return ModelError(f"{self._where} says {key} = {value!r}, but forebay can take only {expected} there.{hint}")

    def refuse_the_rest(self) -> None:
        """Raise ModelError for every key that nobody asked for and that is not known to be without effect."""
        unknown = []
        for key in self._values.keys() - self._taken - _IRRELEVANT:
            if key not in _ONLY:
                unknown.append(key)
            elif self._values[key] not in _ONLY[key]:
                raise self.refusal(key, self._values[key], " or ".join(map(repr, _ONLY[key])))
        if unknown:
            settings = ", ".join(f"{key} = {self._values[key]!r}" for key in sorted(unknown))
            raise ModelError(
                f"{self._where} has settings that nothing here honours: {settings}. A forward that ignored them could "
                "be silently wrong, so the model is refused"
            )
