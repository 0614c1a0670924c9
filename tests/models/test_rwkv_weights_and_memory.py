"""A forward of RWKV with its labels, its weights under TransformerLens' names, and the memory it takes."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch

from forebay.stages.models.errors import ModelError
from forebay.stages.models.load import load_model
from forebay.stages.models.points import EFFECTIVE_ATTN, STATE
from forebay.stages.models.taps import HookSpec

from .rwkv_edits import LENGTHS, ROWS, Rwkv, error
from .rwkv_models import write_pth
from .test_memory import Held

pytestmark = pytest.mark.usefixtures("one_thread")

EFFECTIVE = f"blocks.1.{EFFECTIVE_ATTN}"
WKV = "blocks.1.rwkv.hook_wkv"


def test_a_forward_has_labels_and_nothing_where_there_is_no_token(rwkv: Rwkv) -> None:
    hooks = HookSpec().capture(f"blocks.[0,2].{STATE}", positions=[4, -1]).capture(EFFECTIVE, WKV)
    out = rwkv.model.forward(ROWS, hooks)
    data = out.to_dataset()
    state, effective = data[STATE], data[EFFECTIVE_ATTN]
    assert state.dims == ("layer", "sequence", "state_position", "head", "d_key", "d_value")
    assert state["state_position"].values.tolist() == [4, -1]
    assert numpy.isfinite(state.sel(layer=[0, 2])).all()
    assert numpy.isnan(state.sel(layer=1)).all()
    one = state.sel(layer=2, state_position=-1, sequence=1)
    assert error(torch.from_numpy(one.values), rwkv.naive(1).states[2][-1]) < 1e-5
    assert effective.dims == ("layer", "sequence", "head", "query", "key")
    for row, length in enumerate(LENGTHS):
        mine = effective.sel(layer=1, sequence=row)
        assert numpy.isfinite(mine.sel(query=slice(0, length - 1), key=slice(0, length - 1))).all()
        assert numpy.isnan(mine.sel(query=slice(length, None))).all()
        assert numpy.isnan(mine.sel(key=slice(length, None))).all()
        assert int(numpy.isfinite(data["rwkv.hook_wkv"].sel(layer=1, sequence=row, head=0, d_head=0)).sum()) == length


def test_weights_multiply_from_the_left(rwkv: Rwkv) -> None:
    """What the token before and this one are mixed to, computed here, times a weight is what the forward computes."""
    views, at = rwkv.model.views, "blocks.0."
    out = rwkv.model.forward(ROWS[:1], HookSpec().capture("*"))
    z, post, logits = (out[name] for name in (at + "rwkv.hook_z", at + "mlp.hook_post", "hook_final_norm"))
    assert error(torch.einsum("bthe,hed->btd", z, views.W_O(0)), out[at + "rwkv.hook_out"].double()) < 1e-5
    assert error(post @ views.W_out(0), out[at + "mlp.hook_out"].double()) < 1e-5
    assert error(logits @ views.W_U, out["hook_logits"].double()) < 1e-5
    assert torch.equal(views.W_E, rwkv.tensors["emb.weight"])
    names = {"r": "receptance", "k": "key", "v": "value"}
    for letter, view in {"r": views.W_R, "k": views.W_K, "v": views.W_V}.items():
        theirs = rwkv.tensors[f"{at}att.{names[letter]}.weight"]
        assert view(0).shape == (3, 36, 12)
        x = torch.randn(5, 36)
        assert error(torch.einsum("td,hde->the", x, view(0)).flatten(1), (x @ theirs.T).double()) < 1e-6
    mix = rwkv.tensors[f"{at}ffn.{'time_maa_k' if rwkv.version == 6 else 'x_k'}"].flatten()
    entered = out[at + "mlp.hook_in"][0]
    before = torch.cat((torch.zeros(1, 36), entered[:-1]))
    assert error((entered + (before - entered) * mix) @ views.W_in(0), out[at + "mlp.hook_pre"][0].double()) < 1e-5


def test_weights_that_rwkv_does_not_have_are_refused(rwkv: Rwkv) -> None:
    views = rwkv.model.views
    for lacking in (views.W_Q, views.b_Q, views.b_K, views.b_V, views.b_O, views.b_in, views.b_out):
        with pytest.raises(ModelError, match=rf"this model \(rwkv{rwkv.version}\) has time mixing in the place of att"):
            lacking(0)
    with pytest.raises(ModelError, match="no gate in its MLP"):
        views.W_gate(0)
    with pytest.raises(ModelError, match="no learned positions"):
        _ = views.W_pos
    with pytest.raises(ModelError, match="no bias of the unembedding"):
        _ = views.b_U
    for view in (views.W_R, views.W_K, views.W_V, views.W_O, views.W_in, views.W_out):
        with pytest.raises(ModelError, match="there is no layer 3; the layers of this model are 0 to 2"):
            view(3)


SIZES: dict[str, dict[str, int]] = {
    "as wide as the stream": {},
    "wide heads": {"n_heads": 4, "d_head": 16, "d_model": 24, "d_mlp": 20},
    "wide hidden layers": {"n_heads": 2, "d_head": 8, "d_model": 32, "d_mlp": 300},
}
ASKED = {
    "bare": HookSpec(),
    "residual streams": HookSpec().capture("blocks.*.hook_resid_post", "embed.ln.hook_scale"),
    "states": HookSpec().capture(f"blocks.*.{STATE}", positions=[0, 3, 7, -1]),
    "effective attention": HookSpec().capture(EFFECTIVE),
    "everything": HookSpec().capture("*", f"blocks.*.{EFFECTIVE_ATTN}"),
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("version", [6, 7])
def test_the_estimate_of_memory_bounds_what_is_held(version: int, sizes: str, tmp_path: Path) -> None:
    model = load_model(write_pth(tmp_path / "model.pth", version, **SIZES[sizes]), device="cpu")
    for shape in ((3, 16), (1, 200)):
        tokens = torch.randint(0, 70, shape, generator=torch.Generator().manual_seed(0))
        for asked, hooks in ASKED.items():
            estimate = model.forward_memory(*shape, hooks, logits=asked == "bare")
            with Held() as held:
                out = model.forward(tokens, hooks, logits=asked == "bare")
            assert estimate.captures == sum(value.nbytes for value in out.captures.values())
            assert estimate.logits == (0 if out.logits is None else out.logits.nbytes)
            assert held.peak <= estimate.total - estimate.weights, asked
            assert estimate.total - estimate.weights <= 2 * held.peak, asked


def test_states_keep_nothing_of_the_tokens_alive(rwkv: Rwkv) -> None:
    for batch in (ROWS, ROWS[:1]):
        out = rwkv.model.forward(batch, HookSpec().capture(f"blocks.*.{STATE}"))
        assert out.states is not None
        for layer in out.states.layers:
            for part in (layer.wkv, layer.time_shift, layer.channel_shift):
                assert part.untyped_storage().nbytes() == part.nbytes
        for value in out.captures.values():
            assert value.untyped_storage().nbytes() == value.nbytes
