"""Forebay: compute a language model's inner activations once, keep them labelled, ask them anything later.

The names below are loaded when they are first used: `import forebay` costs neither torch nor xarray.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forebay.pipeline.plan import plan
    from forebay.pipeline.run import run
    from forebay.stages.analyze.dictionary_fit import dictionary_fit
    from forebay.stages.analyze.intervention_effect import intervention_effect
    from forebay.stages.analyze.logit_lens import logit_lens
    from forebay.stages.dictionaries.load import load_dictionary
    from forebay.stages.dictionaries.save import save_dictionary
    from forebay.stages.models.edges import Knockout, KnockoutSpec, SteerAttention
    from forebay.stages.models.interventions import Add, Apply, Replace, Scale, Zero
    from forebay.stages.models.load import load_model
    from forebay.stages.models.points import HookPoint
    from forebay.stages.models.recurrence import Feedback, Recurrence
    from forebay.stages.models.sampling import Sampling
    from forebay.stages.models.source import check_compatibility
    from forebay.stages.models.state_taps import StateKnockout, StateSteering
    from forebay.stages.models.taps import HookSpec
    from forebay.stages.models.unembedding import load_unembedding
    from forebay.stores.tree import open_run, open_store

_HOMES = {
    "Add": "forebay.stages.models.interventions",
    "Apply": "forebay.stages.models.interventions",
    "Feedback": "forebay.stages.models.recurrence",
    "HookPoint": "forebay.stages.models.points",
    "HookSpec": "forebay.stages.models.taps",
    "Knockout": "forebay.stages.models.edges",
    "KnockoutSpec": "forebay.stages.models.edges",
    "Recurrence": "forebay.stages.models.recurrence",
    "Replace": "forebay.stages.models.interventions",
    "Sampling": "forebay.stages.models.sampling",
    "Scale": "forebay.stages.models.interventions",
    "StateKnockout": "forebay.stages.models.state_taps",
    "StateSteering": "forebay.stages.models.state_taps",
    "SteerAttention": "forebay.stages.models.edges",
    "Zero": "forebay.stages.models.interventions",
    "check_compatibility": "forebay.stages.models.source",
    "dictionary_fit": "forebay.stages.analyze.dictionary_fit",
    "intervention_effect": "forebay.stages.analyze.intervention_effect",
    "load_dictionary": "forebay.stages.dictionaries.load",
    "load_model": "forebay.stages.models.load",
    "load_unembedding": "forebay.stages.models.unembedding",
    "logit_lens": "forebay.stages.analyze.logit_lens",
    "open_run": "forebay.stores.tree",
    "open_store": "forebay.stores.tree",
    "plan": "forebay.pipeline.plan",
    "run": "forebay.pipeline.run",
    "save_dictionary": "forebay.stages.dictionaries.save",
}

__version__ = metadata.version("forebay")
__all__ = [
    "Add",
    "Apply",
    "Feedback",
    "HookPoint",
    "HookSpec",
    "Knockout",
    "KnockoutSpec",
    "Recurrence",
    "Replace",
    "Sampling",
    "Scale",
    "StateKnockout",
    "StateSteering",
    "SteerAttention",
    "Zero",
    "check_compatibility",
    "dictionary_fit",
    "intervention_effect",
    "load_dictionary",
    "load_model",
    "load_unembedding",
    "logit_lens",
    "open_run",
    "open_store",
    "plan",
    "run",
    "save_dictionary",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module 'forebay' has no attribute {name!r}; it has {', '.join(__all__)}")
        return getattr(import_module(_HOMES[name]), name)

    def __dir__() -> list[str]:
        return [*__all__, "__version__"]
