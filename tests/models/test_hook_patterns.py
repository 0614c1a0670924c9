"""Hook points have names that read back, an order, and patterns that never pass over a mistake."""

from __future__ import annotations

import dataclasses
import random

import pytest

from forebay.stages.models.errors import HookError
from forebay.stages.models.points import AFTER, BEFORE, BLOCK, HookPoint, dims_of, expand
from forebay.stages.models.spec import ModelSpec, RopeSpec

SPEC = ModelSpec(
    family="llama",
    n_layers=30,
    d_model=16,
    n_heads=4,
    n_kv_heads=2,
    d_head=6,
    d_mlp=20,
    d_vocab=50,
    n_ctx=32,
    norm_eps=1e-5,
    rope=RopeSpec(base=1e4),
)
POINTS = SPEC.points()


def names(*patterns: str | HookPoint) -> list[str]:
    return [str(point) for point in expand(patterns, POINTS)]


def test_every_name_reads_back() -> None:
    for point in POINTS:
        assert HookPoint.parse(str(point)) == point


def test_points_sort_in_firing_order() -> None:
    shuffled = list(POINTS)
    random.Random(0).shuffle(shuffled)
    assert sorted(shuffled) == list(POINTS)
    assert HookPoint("hook_embed") < HookPoint("hook_resid_pre", 0) < HookPoint("attn.hook_q", 0)
    assert HookPoint("hook_resid_post", 9) < HookPoint("hook_resid_pre", 10) < HookPoint("hook_final_norm")


def test_a_llama_has_every_point_but_learned_positions_and_those_of_recurrent_models() -> None:
    recurrent = {kind for kind in BLOCK if kind.startswith("rwkv.")} | {"mlp.hook_receptance"}
    assert {point.kind for point in POINTS} == {"hook_embed", *BLOCK, *AFTER} - recurrent
    assert len(POINTS) == len(set(POINTS)) == 1 + 30 * (len(BLOCK) - len(recurrent)) + len(AFTER)
    assert {"hook_embed", "hook_pos_embed"} < {*BEFORE}


def test_sizes_cover_every_dimension_that_tokens_do_not_decide() -> None:
    dims = {dim for point in POINTS for dim in point.dims} - {"sequence", "position", "query", "key"}
    assert dims | {"layer"} == set(SPEC.sizes)


def test_a_star_stands_for_the_contributions_of_heads_only_where_they_are_spelt_out() -> None:
    everything = names("*")
    assert len(everything) == len(POINTS) - SPEC.n_layers
    assert not any("hook_result" in name for name in [*everything, *names("blocks.3.attn.*")])
    assert names("blocks.*.hook_result") == [f"blocks.{layer}.attn.hook_result" for layer in range(SPEC.n_layers)]
    assert names("blocks.3.attn.hook_result") == names("blocks.3.*hook_result*") == ["blocks.3.attn.hook_result"]


@pytest.mark.parametrize(
    ("kind", "dims"),
    [
        ("hook_resid_post", ("sequence", "position", "d_model")),
        ("attn.hook_q", ("sequence", "position", "head", "d_head")),
        ("attn.hook_rot_k", ("sequence", "position", "kv_head", "d_head")),
        ("attn.hook_pattern", ("sequence", "head", "query", "key")),
        ("attn.hook_result", ("sequence", "position", "head", "d_model")),
        ("ln1.hook_scale", ("sequence", "position")),
        ("mlp.hook_post", ("sequence", "position", "d_mlp")),
        ("hook_logits", ("sequence", "position", "vocab")),
    ],
)
def test_dims(kind: str, dims: tuple[str, ...]) -> None:
    assert dims_of(kind) == dims


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("blocks.3.hook_out", "blocks.3.hook_resid_post"),
        ("blocks.3.hook_in", "blocks.3.hook_resid_pre"),
        ("embed.hook_out", "hook_embed"),
        ("unembed.hook_out", "hook_logits"),
    ],
)
def test_names_of_equal_meaning_are_aliases(alias: str, name: str) -> None:
    assert str(HookPoint.parse(alias)) == name
    assert names(alias) == [name]


def test_patterns() -> None:
    assert names("blocks.*.hook_resid_post") == [f"blocks.{i}.hook_resid_post" for i in range(30)]
    assert names("blocks.[8-11].hook_resid_post") == [f"blocks.{i}.hook_resid_post" for i in (8, 9, 10, 11)]
    assert names("blocks.[0,28-29].attn.hook_z") == [f"blocks.{i}.attn.hook_z" for i in (0, 28, 29)]
    assert names("blocks.{4,12}.attn.hook_{q,k}") == [
        "blocks.4.attn.hook_q",
        "blocks.4.attn.hook_k",
        "blocks.12.attn.hook_q",
        "blocks.12.attn.hook_k",
    ]
    assert names("blocks.7.*") == [
        str(point) for point in POINTS if point.layer == 7 and point.kind != "attn.hook_result"
    ]
    assert names("*") == [str(point) for point in POINTS if point.kind != "attn.hook_result"]


def test_the_result_is_in_firing_order_and_without_repetition() -> None:
    given = ("hook_logits", "blocks.2.hook_resid_post", HookPoint("hook_resid_pre", 2), "blocks.2.hook_resid_*")
    assert names(*given) == [
        "blocks.2.hook_resid_pre",
        "blocks.2.hook_resid_mid",
        "blocks.2.hook_resid_post",
        "hook_logits",
    ]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("blocks.30.hook_resid_post", r"names layer 30, but the layers of this model are 0 to 29"),
        ("blocks.[28-31].hook_resid_post", r"names layer 30, but the layers of this model are 0 to 29"),
        ("blocks.{3,99}.attn.hook_z", r"names layer 99, but the layers of this model are 0 to 29"),
        ("blocks.31.*", r"names layer 31, but the layers of this model are 0 to 29"),
        (HookPoint("hook_resid_mid", 44), r"names layer 44"),
        ("blocks.3.hook_resid_pots", r"Did you mean 'blocks\.3\.hook_resid_post'\?"),
        ("blocks.3.hook_z", r"Did you mean 'blocks\.3\.attn\.hook_z'\?"),
        ("blocks.*.hook_resid_pots", r"Did you mean 'blocks\.\*\.hook_resid_post'\?"),
        ("blocks.2.{hook_resid_pre,hook_rseid_post}", r"'blocks\.2\.hook_rseid_post'.*Did you mean"),
        ("hook_embd", r"Did you mean 'hook_embed'\?"),
        ("hook_pos_embed", r"has no hook point 'hook_pos_embed'; it has hook_embed, blocks\.\*\.hook_resid_pre"),
        ("hook_resid_post", r"lies in a block and needs its layer: 'blocks\.0\.hook_resid_post'"),
        ("blocks.3.attn.hook_scores", r"scores before soft-cap and mask are not kept"),
        ("blocks.[3-.hook_resid_post", r"without its partner"),
        ("blocks.{1,{2,3}}.hook_resid_post", r"without its partner|inside another"),
        ("blocks.[a-b].hook_resid_post", r"no list of whole numbers"),
        ("blocks.[5-3].hook_resid_post", r"counts down"),
        ("blocks.[0-999999].hook_resid_post", r"stands for 1,000,000 names"),
    ],
)
def test_a_pattern_that_names_nothing_says_why(pattern: str | HookPoint, message: str) -> None:
    with pytest.raises(HookError, match=message):
        expand([pattern], POINTS)


@pytest.mark.parametrize(
    ("kind", "layer", "message"),
    [
        ("hook_resid_post", None, "must be a number from 0 on"),
        ("hook_resid_post", -1, "must be a number from 0 on"),
        ("hook_embed", 2, "takes no layer"),
        ("hook_rezid_post", 2, "Did you mean 'hook_resid_post'"),
    ],
)
def test_a_point_that_cannot_be_is_refused(kind: str, layer: int | None, message: str) -> None:
    with pytest.raises(HookError, match=message):
        HookPoint(kind, layer)


def test_a_spec_is_plain_data() -> None:
    assert ModelSpec(**{**dataclasses.asdict(SPEC), "rope": RopeSpec(**dataclasses.asdict(SPEC.rope))}) == SPEC
