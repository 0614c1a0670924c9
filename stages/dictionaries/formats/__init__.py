"""The formats of the field, one module each."""

from collections.abc import Mapping

from . import (
    circuit_tracer,
    crosslayer_coding,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    saelens,
    sparsify,
)
from .format import Format

FORMATS: Mapping[str, Format] = {
    "saelens": saelens.FORMAT,
    "gemma-scope": gemma_scope.FORMAT,
    "gemma-scope-2": gemma_scope_2.FORMAT,
    "llama-scope": llama_scope.FORMAT,
    "sparsify": sparsify.FORMAT,
    "dictionary-learning": dictionary_learning.FORMAT,
    "circuit-tracer": circuit_tracer.FORMAT,
    "crosslayer-coding": crosslayer_coding.FORMAT,
}
"""Name → format. A place is of the one format that recognizes it."""
