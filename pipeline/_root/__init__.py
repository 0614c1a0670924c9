"""Forebay: compute a language model's inner activations once, keep them labelled, ask them anything later.

The names below are loaded when they are first used: `import forebay` costs neither torch nor xarray.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from forebay.stores.deprecation import Renamed

if TYPE_CHECKING:
    __version__: str

    import forebay.stages.plots as plot
    from forebay.pipeline.appending import append
    from forebay.pipeline.combining import export
    from forebay.pipeline.hub.pull import from_hub
    from forebay.pipeline.hub.push import push_to_hub
    from forebay.pipeline.interchange.activault_files import from_activault
    from forebay.pipeline.interchange.delphi_cache import from_delphi
    from forebay.pipeline.interchange.sae_lens_dataset import to_sae_lens
    from forebay.pipeline.interchange.safetensors_files import to_safetensors
    from forebay.pipeline.plan import plan
    from forebay.pipeline.run import run
    from forebay.stages.algzoo.load import load_algzoo
    from forebay.stages.analyze.ablation import ablation_effect
    from forebay.stages.analyze.activation_patching import activation_patching
    from forebay.stages.analyze.attention import (
        attention_distance,
        attention_entropy,
        attention_from,
        attention_to,
        attention_to_targets,
        top_edges,
    )
    from forebay.stages.analyze.attention_ablation import knockout_effect, knockout_sweep
    from forebay.stages.analyze.attribution_patching import attribution_patching, patching_agreement
    from forebay.stages.analyze.block_patching import block_patching, map_positions
    from forebay.stages.analyze.causal_tracing import causal_tracing, embedding_std, indirect_effect
    from forebay.stages.analyze.character_count import character_count_manifold
    from forebay.stages.analyze.decoder_projection import (
        AttributionEdge,
        AttributionGraph,
        build_attribution_graph,
        build_attribution_graphs,
        score_features_by_decoder_projection,
    )
    from forebay.stages.analyze.dictionary_fit import dictionary_fit
    from forebay.stages.analyze.directions import contrastive_direction, mean_difference, separation, token_direction
    from forebay.stages.analyze.effective_attention import normalize_effective_attention
    from forebay.stages.analyze.head_detectors import detect_heads, detection_patterns, head_detectors, random_repeats
    from forebay.stages.analyze.intervention_effect import compare_logits, intervention_effect, logit_change
    from forebay.stages.analyze.logit_attribution import logit_attribution, neuron_attribution
    from forebay.stages.analyze.logit_lens import first_appearance, logit_lens, next_tokens
    from forebay.stages.analyze.loss_recovered import loss_recovered
    from forebay.stages.analyze.massive_activations import massive_activations
    from forebay.stages.analyze.metrics import (
        Divergence,
        Logit,
        LogitDifference,
        LogProbability,
        Metric,
        Probability,
        divergence,
    )
    from forebay.stages.analyze.moments import moments
    from forebay.stages.analyze.patching import divergence_from, pairs_of, recovery, run_variants
    from forebay.stages.analyze.path_patching import Receiver, path_patching
    from forebay.stages.analyze.pca import pca, pca_of, project, reconstruct
    from forebay.stages.analyze.position_sweep import position_sweep
    from forebay.stages.analyze.probing import apply_probe, probe
    from forebay.stages.analyze.prompts import position_coords
    from forebay.stages.analyze.recurrent_feedback import FeedbackCondition, feedback_sweep, rhyme_experiment
    from forebay.stages.analyze.residual_decomposition import accumulated_resid, decompose_resid
    from forebay.stages.analyze.similarity import direction_cosine, layer_cosine, linear_cka
    from forebay.stages.analyze.state_ablation import state_knockout_effect, state_sweep
    from forebay.stages.analyze.statistics import mean_by, norm_statistics
    from forebay.stages.analyze.steering import (
        DOSE_LEVELS,
        SteeringCalibration,
        calibrate_steering,
        direction_dose_response,
        dose_response,
        edge_attention,
        scale_for_target,
    )
    from forebay.stages.analyze.steering_convergence import steering_convergence, strength_sweep
    from forebay.stages.analyze.tokens import as_run
    from forebay.stages.dictionaries.dictionary import Dictionary
    from forebay.stages.dictionaries.interventions import Clamp, Inject, Splice, Suppress
    from forebay.stages.dictionaries.load import load_dictionary
    from forebay.stages.dictionaries.save import save_dictionary
    from forebay.stages.dictionaries.transcoders import FeatureId, TranscoderSet
    from forebay.stages.models.edges import Knockout, KnockoutSpec, SteerAttention, SteeringSpec
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
    from forebay.stores.concat import concat
    from forebay.stores.tree import open_run, open_store

_HOMES = {
    "Add": "forebay.stages.models.interventions",
    "Apply": "forebay.stages.models.interventions",
    "AttributionEdge": "forebay.stages.analyze.decoder_projection",
    "AttributionGraph": "forebay.stages.analyze.decoder_projection",
    "Clamp": "forebay.stages.dictionaries.interventions",
    "DOSE_LEVELS": "forebay.stages.analyze.steering",
    "Dictionary": "forebay.stages.dictionaries.dictionary",
    "Divergence": "forebay.stages.analyze.metrics",
    "FeatureId": "forebay.stages.dictionaries.transcoders",
    "Feedback": "forebay.stages.models.recurrence",
    "FeedbackCondition": "forebay.stages.analyze.recurrent_feedback",
    "HookPoint": "forebay.stages.models.points",
    "HookSpec": "forebay.stages.models.taps",
    "Inject": "forebay.stages.dictionaries.interventions",
    "Knockout": "forebay.stages.models.edges",
    "KnockoutSpec": "forebay.stages.models.edges",
    "LogProbability": "forebay.stages.analyze.metrics",
    "Logit": "forebay.stages.analyze.metrics",
    "LogitDifference": "forebay.stages.analyze.metrics",
    "Metric": "forebay.stages.analyze.metrics",
    "Probability": "forebay.stages.analyze.metrics",
    "Receiver": "forebay.stages.analyze.path_patching",
    "Recurrence": "forebay.stages.models.recurrence",
    "Replace": "forebay.stages.models.interventions",
    "Sampling": "forebay.stages.models.sampling",
    "Scale": "forebay.stages.models.interventions",
    "Splice": "forebay.stages.dictionaries.interventions",
    "StateKnockout": "forebay.stages.models.state_taps",
    "StateSteering": "forebay.stages.models.state_taps",
    "SteerAttention": "forebay.stages.models.edges",
    "SteeringCalibration": "forebay.stages.analyze.steering",
    "SteeringSpec": "forebay.stages.models.edges",
    "Suppress": "forebay.stages.dictionaries.interventions",
    "TranscoderSet": "forebay.stages.dictionaries.transcoders",
    "Zero": "forebay.stages.models.interventions",
    "ablation_effect": "forebay.stages.analyze.ablation",
    "accumulated_resid": "forebay.stages.analyze.residual_decomposition",
    "activation_patching": "forebay.stages.analyze.activation_patching",
    "append": "forebay.pipeline.appending",
    "apply_probe": "forebay.stages.analyze.probing",
    "as_run": "forebay.stages.analyze.tokens",
    "attention_distance": "forebay.stages.analyze.attention",
    "attention_entropy": "forebay.stages.analyze.attention",
    "attention_from": "forebay.stages.analyze.attention",
    "attention_to": "forebay.stages.analyze.attention",
    "attention_to_targets": "forebay.stages.analyze.attention",
    "attribution_patching": "forebay.stages.analyze.attribution_patching",
    "block_patching": "forebay.stages.analyze.block_patching",
    "build_attribution_graph": "forebay.stages.analyze.decoder_projection",
    "build_attribution_graphs": "forebay.stages.analyze.decoder_projection",
    "calibrate_steering": "forebay.stages.analyze.steering",
    "causal_mask": "forebay.stages.models.masks",
    "causal_tracing": "forebay.stages.analyze.causal_tracing",
    "character_count_manifold": "forebay.stages.analyze.character_count",
    "check_compatibility": "forebay.stages.models.source",
    "compare_logits": "forebay.stages.analyze.intervention_effect",
    "concat": "forebay.stores.concat",
    "contrastive_direction": "forebay.stages.analyze.directions",
    "decompose_resid": "forebay.stages.analyze.residual_decomposition",
    "detect_heads": "forebay.stages.analyze.head_detectors",
    "detection_patterns": "forebay.stages.analyze.head_detectors",
    "dictionary_fit": "forebay.stages.analyze.dictionary_fit",
    "direction_cosine": "forebay.stages.analyze.similarity",
    "direction_dose_response": "forebay.stages.analyze.steering",
    "divergence": "forebay.stages.analyze.metrics",
    "divergence_from": "forebay.stages.analyze.patching",
    "dose_response": "forebay.stages.analyze.steering",
    "edge_attention": "forebay.stages.analyze.steering",
    "embedding_std": "forebay.stages.analyze.causal_tracing",
    "export": "forebay.pipeline.combining",
    "feedback_sweep": "forebay.stages.analyze.recurrent_feedback",
    "first_appearance": "forebay.stages.analyze.logit_lens",
    "from_activault": "forebay.pipeline.interchange.activault_files",
    "from_delphi": "forebay.pipeline.interchange.delphi_cache",
    "from_hub": "forebay.pipeline.hub.pull",
    "head_detectors": "forebay.stages.analyze.head_detectors",
    "indirect_effect": "forebay.stages.analyze.causal_tracing",
    "intervention_effect": "forebay.stages.analyze.intervention_effect",
    "knockout_effect": "forebay.stages.analyze.attention_ablation",
    "knockout_sweep": "forebay.stages.analyze.attention_ablation",
    "layer_cosine": "forebay.stages.analyze.similarity",
    "linear_cka": "forebay.stages.analyze.similarity",
    "load_algzoo": "forebay.stages.algzoo.load",
    "load_dictionary": "forebay.stages.dictionaries.load",
    "load_model": "forebay.stages.models.load",
    "load_unembedding": "forebay.stages.models.unembedding",
    "logit_attribution": "forebay.stages.analyze.logit_attribution",
    "logit_change": "forebay.stages.analyze.intervention_effect",
    "logit_lens": "forebay.stages.analyze.logit_lens",
    "loss_recovered": "forebay.stages.analyze.loss_recovered",
    "map_positions": "forebay.stages.analyze.block_patching",
    "massive_activations": "forebay.stages.analyze.massive_activations",
    "mean_by": "forebay.stages.analyze.statistics",
    "mean_difference": "forebay.stages.analyze.directions",
    "moments": "forebay.stages.analyze.moments",
    "neuron_attribution": "forebay.stages.analyze.logit_attribution",
    "next_tokens": "forebay.stages.analyze.logit_lens",
    "norm_statistics": "forebay.stages.analyze.statistics",
    "normalize_effective_attention": "forebay.stages.analyze.effective_attention",
    "open_run": "forebay.stores.tree",
    "open_store": "forebay.stores.tree",
    "pairs_of": "forebay.stages.analyze.patching",
    "patching_agreement": "forebay.stages.analyze.attribution_patching",
    "path_patching": "forebay.stages.analyze.path_patching",
    "pca": "forebay.stages.analyze.pca",
    "pca_of": "forebay.stages.analyze.pca",
    "plan": "forebay.pipeline.plan",
    "position_coords": "forebay.stages.analyze.prompts",
    "position_sweep": "forebay.stages.analyze.position_sweep",
    "probe": "forebay.stages.analyze.probing",
    "project": "forebay.stages.analyze.pca",
    "push_to_hub": "forebay.pipeline.hub.push",
    "random_repeats": "forebay.stages.analyze.head_detectors",
    "reconstruct": "forebay.stages.analyze.pca",
    "recovery": "forebay.stages.analyze.patching",
    "rhyme_experiment": "forebay.stages.analyze.recurrent_feedback",
    "run": "forebay.pipeline.run",
    "run_variants": "forebay.stages.analyze.patching",
    "save_dictionary": "forebay.stages.dictionaries.save",
    "scale_for_target": "forebay.stages.analyze.steering",
    "score_features_by_decoder_projection": "forebay.stages.analyze.decoder_projection",
    "separation": "forebay.stages.analyze.directions",
    "state_knockout_effect": "forebay.stages.analyze.state_ablation",
    "state_sweep": "forebay.stages.analyze.state_ablation",
    "steering_convergence": "forebay.stages.analyze.steering_convergence",
    "strength_sweep": "forebay.stages.analyze.steering_convergence",
    "to_sae_lens": "forebay.pipeline.interchange.sae_lens_dataset",
    "to_safetensors": "forebay.pipeline.interchange.safetensors_files",
    "token_direction": "forebay.stages.analyze.directions",
    "top_edges": "forebay.stages.analyze.attention",
    "visible_keys": "forebay.stages.models.masks",
}
_MODULES = {"plot": "forebay.stages.plots"}
_OPENING = ("as_run", "concat", "open_run", "open_store")
"""They give trees, which have `run.features(…)`, `run.batches(…)`, `.forebay` once those are registered with xarray."""

_RENAMED: dict[str, Renamed] = {}
"""Old names of the front door, which warn: `"old": Renamed("forebay.old", "forebay.new", since="0.3")`."""

__all__ = [
    "DOSE_LEVELS",
    "Add",
    "Apply",
    "AttributionEdge",
    "AttributionGraph",
    "Clamp",
    "Dictionary",
    "Divergence",
    "FeatureId",
    "Feedback",
    "FeedbackCondition",
    "HookPoint",
    "HookSpec",
    "Inject",
    "Knockout",
    "KnockoutSpec",
    "LogProbability",
    "Logit",
    "LogitDifference",
    "Metric",
    "Probability",
    "Receiver",
    "Recurrence",
    "Replace",
    "Sampling",
    "Scale",
    "Splice",
    "StateKnockout",
    "StateSteering",
    "SteerAttention",
    "SteeringCalibration",
    "SteeringSpec",
    "Suppress",
    "TranscoderSet",
    "Zero",
    "ablation_effect",
    "accumulated_resid",
    "activation_patching",
    "append",
    "apply_probe",
    "as_run",
    "attention_distance",
    "attention_entropy",
    "attention_from",
    "attention_to",
    "attention_to_targets",
    "attribution_patching",
    "block_patching",
    "build_attribution_graph",
    "build_attribution_graphs",
    "calibrate_steering",
    "causal_mask",
    "causal_tracing",
    "character_count_manifold",
    "check_compatibility",
    "compare_logits",
    "concat",
    "contrastive_direction",
    "decompose_resid",
    "detect_heads",
    "detection_patterns",
    "dictionary_fit",
    "direction_cosine",
    "direction_dose_response",
    "divergence",
    "divergence_from",
    "dose_response",
    "edge_attention",
    "embedding_std",
    "export",
    "feedback_sweep",
    "first_appearance",
    "from_activault",
    "from_delphi",
    "from_hub",
    "head_detectors",
    "indirect_effect",
    "intervention_effect",
    "knockout_effect",
    "knockout_sweep",
    "layer_cosine",
    "linear_cka",
    "load_algzoo",
    "load_dictionary",
    "load_model",
    "load_unembedding",
    "logit_attribution",
    "logit_change",
    "logit_lens",
    "loss_recovered",
    "map_positions",
    "massive_activations",
    "mean_by",
    "mean_difference",
    "moments",
    "neuron_attribution",
    "next_tokens",
    "norm_statistics",
    "normalize_effective_attention",
    "open_run",
    "open_store",
    "pairs_of",
    "patching_agreement",
    "path_patching",
    "pca",
    "pca_of",
    "plan",
    "plot",
    "position_coords",
    "position_sweep",
    "probe",
    "project",
    "push_to_hub",
    "random_repeats",
    "reconstruct",
    "recovery",
    "rhyme_experiment",
    "run",
    "run_variants",
    "save_dictionary",
    "scale_for_target",
    "score_features_by_decoder_projection",
    "separation",
    "state_knockout_effect",
    "state_sweep",
    "steering_convergence",
    "strength_sweep",
    "to_sae_lens",
    "to_safetensors",
    "token_direction",
    "top_edges",
    "visible_keys",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name == "__version__":
            from importlib.metadata import version  # takes longer to import than everything else here

            return version("forebay")
        if name in _RENAMED:
            _RENAMED[name].warn()
            return getattr(import_module("forebay"), _RENAMED[name].instead.removeprefix("forebay."))
        if name in _MODULES:
            return import_module(_MODULES[name])
        if name not in _HOMES:
            raise AttributeError(f"module 'forebay' has no attribute {name!r}; it has {', '.join(__all__)}")
        if name in _OPENING:
            import_module("forebay.stages.accessors")
        return getattr(import_module(_HOMES[name]), name)

    def __dir__() -> list[str]:
        return [*__all__, "__version__"]
