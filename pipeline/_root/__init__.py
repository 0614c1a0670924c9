"""Forebay: compute a language model's inner activations once, keep them labelled, ask them anything later.

The names below are loaded when they are first used: `import forebay` costs neither torch nor xarray.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import forebay.stages.plots as plot
    from forebay.pipeline.plan import plan
    from forebay.pipeline.run import run
    from forebay.stages.analyze.decoder_projection import (
        AttributionEdge,
        AttributionGraph,
        build_attribution_graph,
        build_attribution_graphs,
        score_features_by_decoder_projection,
    )
    from forebay.stages.analyze.dictionary_fit import dictionary_fit
    from forebay.stages.analyze.intervention_effect import intervention_effect
    from forebay.stages.analyze.logit_lens import logit_lens
    from forebay.stages.analyze.loss_recovered import loss_recovered
    from forebay.stages.analyze.metrics import Divergence, Logit, LogitDifference, LogProbability, Probability
    from forebay.stages.analyze.moments import moments
    from forebay.stages.analyze.tokens import as_run
    from forebay.stages.dictionaries.dictionary import Dictionary
    from forebay.stages.dictionaries.interventions import Clamp, Inject, Splice, Suppress
    from forebay.stages.dictionaries.load import load_dictionary
    from forebay.stages.dictionaries.save import save_dictionary
    from forebay.stages.dictionaries.transcoders import FeatureId, TranscoderSet
    from forebay.stages.models.edges import Knockout, KnockoutSpec, SteerAttention
    from forebay.stages.models.interventions import Add, Apply, Replace, Scale, Zero
    from forebay.stages.models.load import load_model
    from forebay.stages.models.masks import causal_mask, visible_keys
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
    "AttributionEdge": "forebay.stages.analyze.decoder_projection",
    "AttributionGraph": "forebay.stages.analyze.decoder_projection",
    "Clamp": "forebay.stages.dictionaries.interventions",
    "Dictionary": "forebay.stages.dictionaries.dictionary",
    "Divergence": "forebay.stages.analyze.metrics",
    "FeatureId": "forebay.stages.dictionaries.transcoders",
    "Feedback": "forebay.stages.models.recurrence",
    "HookPoint": "forebay.stages.models.points",
    "HookSpec": "forebay.stages.models.taps",
    "Inject": "forebay.stages.dictionaries.interventions",
    "Knockout": "forebay.stages.models.edges",
    "KnockoutSpec": "forebay.stages.models.edges",
    "LogProbability": "forebay.stages.analyze.metrics",
    "Logit": "forebay.stages.analyze.metrics",
    "LogitDifference": "forebay.stages.analyze.metrics",
    "Probability": "forebay.stages.analyze.metrics",
    "Recurrence": "forebay.stages.models.recurrence",
    "Replace": "forebay.stages.models.interventions",
    "Sampling": "forebay.stages.models.sampling",
    "Scale": "forebay.stages.models.interventions",
    "Splice": "forebay.stages.dictionaries.interventions",
    "StateKnockout": "forebay.stages.models.state_taps",
    "StateSteering": "forebay.stages.models.state_taps",
    "SteerAttention": "forebay.stages.models.edges",
    "Suppress": "forebay.stages.dictionaries.interventions",
    "TranscoderSet": "forebay.stages.dictionaries.transcoders",
    "Zero": "forebay.stages.models.interventions",
    "as_run": "forebay.stages.analyze.tokens",
    "build_attribution_graph": "forebay.stages.analyze.decoder_projection",
    "build_attribution_graphs": "forebay.stages.analyze.decoder_projection",
    "causal_mask": "forebay.stages.models.masks",
    "check_compatibility": "forebay.stages.models.source",
    "dictionary_fit": "forebay.stages.analyze.dictionary_fit",
    "intervention_effect": "forebay.stages.analyze.intervention_effect",
    "load_dictionary": "forebay.stages.dictionaries.load",
    "load_model": "forebay.stages.models.load",
    "load_unembedding": "forebay.stages.models.unembedding",
    "logit_lens": "forebay.stages.analyze.logit_lens",
    "loss_recovered": "forebay.stages.analyze.loss_recovered",
    "moments": "forebay.stages.analyze.moments",
    "open_run": "forebay.stores.tree",
    "open_store": "forebay.stores.tree",
    "plan": "forebay.pipeline.plan",
    "run": "forebay.pipeline.run",
    "save_dictionary": "forebay.stages.dictionaries.save",
    "score_features_by_decoder_projection": "forebay.stages.analyze.decoder_projection",
    "visible_keys": "forebay.stages.models.masks",
}
_MODULES = {"plot": "forebay.stages.plots"}
_OPENING = ("open_run", "open_store")
"""They give trees, which have `run.features(…)` and `run.batches(…)` once those are registered with xarray."""

__version__ = metadata.version("forebay")
__all__ = [
    "Add",
    "Apply",
    "AttributionEdge",
    "AttributionGraph",
    "Clamp",
    "Dictionary",
    "Divergence",
    "FeatureId",
    "Feedback",
    "HookPoint",
    "HookSpec",
    "Inject",
    "Knockout",
    "KnockoutSpec",
    "LogProbability",
    "Logit",
    "LogitDifference",
    "Probability",
    "Recurrence",
    "Replace",
    "Sampling",
    "Scale",
    "Splice",
    "StateKnockout",
    "StateSteering",
    "SteerAttention",
    "Suppress",
    "TranscoderSet",
    "Zero",
    "as_run",
    "build_attribution_graph",
    "build_attribution_graphs",
    "causal_mask",
    "check_compatibility",
    "dictionary_fit",
    "intervention_effect",
    "load_dictionary",
    "load_model",
    "load_unembedding",
    "logit_lens",
    "loss_recovered",
    "moments",
    "open_run",
    "open_store",
    "plan",
    "plot",
    "run",
    "save_dictionary",
    "score_features_by_decoder_projection",
    "visible_keys",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name in _MODULES:
            return import_module(_MODULES[name])
        if name not in _HOMES:
            raise AttributeError(f"module 'forebay' has no attribute {name!r}; it has {', '.join(__all__)}")
        if name in _OPENING:
            import_module("forebay.stages.accessors")
        return getattr(import_module(_HOMES[name]), name)

    def __dir__() -> list[str]:
        return [*__all__, "__version__"]
