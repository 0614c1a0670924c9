"""RWKV-6 and RWKV-7 written down once more from the equations, in float64: a token, a layer, a head after the other.

Sources: Peng et al. 2024 (arXiv:2404.05892, section 4) and 2025 (arXiv:2503.14456, section 4). Nothing is shared with
forebay but the names of the hook points. It is slow and means to be read.

    naive = run(tensors, 7, ids)                  # the tensors of a .pth file, by their own names (`random_tensors`)
    naive.logits                                  # [position, vocab]
    naive.values["blocks.1.rwkv.hook_decay"]      # [position, head, channel]: every hook point, all positions
    naive.states[1]                               # [position, head, key, value]: what each token hands on
    run(tensors, 7, more, begin=naive.end)        # the next piece of the same text

What is changed, and where (positions are those of `ids`, whatever came before them):

    edits={"blocks.1.rwkv.hook_a": lambda value, position: value * 0 if position == 3 else value}
    writes={1: factors}                           # [position, head]: s in S ← … + s · k vᵀ, and nowhere else
    states={(1, 4): lambda state: state * 0}      # the state [head, key, value] that token 4 hands on in layer 1

An edit takes the value of one token, without the sequence's and the position's axis, and gives the one that flows on
from there; both `values` and `states` hold what flows on. Values of layer 0 that an edit changed are what later layers
of RWKV-7 remember. `rwkv.hook_effective_attn` is not among the values: `effective_attention` gives it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Edit = Callable[[Tensor, int], Tensor]
Memory = tuple[Tensor, Tensor, Tensor]
"""Of one layer: what entered time mixing [channel], the state [head, key, value], what entered channel mixing."""

_E = 2.718281828459045
_NORM_EPS, _GROUP_NORM_EPS = 1e-5, 64e-5


@dataclass(frozen=True)
class Naive:
    """What a run gives, all of it in float64: see above. `end` is the memory of every layer after the last token."""

    logits: Tensor
    values: dict[str, Tensor]
    states: list[Tensor]
    end: list[Memory]


def run(
    tensors: Mapping[str, Tensor],
    version: int,
    ids: Sequence[int],
    *,
    edits: Mapping[str, Edit] | None = None,
    writes: Mapping[int, Tensor] | None = None,
    states: Mapping[tuple[int, int], Callable[[Tensor], Tensor]] | None = None,
    begin: Sequence[Memory] | None = None,
) -> Naive:
    """Run token ids one at a time. Raises KeyError for an edit at a name that never occurs."""
    w = {name: _without_empty_axes(tensor.double()) for name, tensor in tensors.items()}
    n_layers = 1 + max(int(found[1]) for name in w if (found := re.match(r"blocks\.(\d+)\.", name)))
    see = _Seen(edits or {})
    token = _Token(w, see, version, writes or {}, states or {})
    memory = list(begin) if begin is not None else [token.nothing()] * n_layers
    after: list[list[Tensor]] = [[] for _ in range(n_layers)]
    for position, number in enumerate(ids):
        see.position = position
        x = see("hook_embed", token.norm(w["emb.weight"][number], "blocks.0.ln0", "embed.ln"))
        for layer in range(n_layers):
            x, memory[layer] = token.block(x, layer, memory[layer])
            after[layer].append(memory[layer][1])
        final = see("hook_final_norm", token.norm(x, "ln_out", "ln_final"))
        see("hook_logits", w["head.weight"] @ final)
    if unused := set(see.edits) - set(see.values):
        raise KeyError(f"edits at {sorted(unused)} would never be made: there are {sorted(see.values)}")
    values = {name: torch.stack(of_tokens) for name, of_tokens in see.values.items()}
    return Naive(values["hook_logits"], values, [torch.stack(of_tokens) for of_tokens in after], memory)


@dataclass
class _Seen:
    """Called with a value where it occurs: edits it, notes it down, gives it back."""

    edits: Mapping[str, Edit]
    values: dict[str, list[Tensor]] = field(default_factory=dict)
    position: int = 0

    def __call__(self, name: str, value: Tensor) -> Tensor:
        if name in self.edits:
            value = self.edits[name](value.clone(), self.position).double()
        self.values.setdefault(name, []).append(value)
        return value


class _Token:
    """The equations of one token."""

    def __init__(
        self,
        w: Mapping[str, Tensor],
        see: _Seen,
        version: int,
        writes: Mapping[int, Tensor],
        states: Mapping[tuple[int, int], Callable[[Tensor], Tensor]],
    ) -> None:
        self.w, self.see, self.version, self.writes, self.states = w, see, version, writes, states
        self.u = "time_faaaa" if version == 6 else "r_k"
        self.n_heads, self.d_head = w[f"blocks.0.att.{self.u}"].shape
        self.v_first = torch.empty(0)

    def nothing(self) -> Memory:
        before = torch.zeros(self.w["emb.weight"].shape[1], dtype=torch.float64)
        return before, torch.zeros(self.n_heads, self.d_head, self.d_head, dtype=torch.float64), before

    def norm(self, x: Tensor, weights: str, name: str) -> Tensor:
        centred = x - x.sum() / len(x)
        scale = self.see(f"{name}.hook_scale", ((centred**2).sum() / len(x) + _NORM_EPS) ** 0.5)
        normalized = self.see(f"{name}.hook_normalized", centred / scale)
        return normalized * self.w[f"{weights}.weight"] + self.w[f"{weights}.bias"]

    def block(self, x: Tensor, layer: int, memory: Memory) -> tuple[Tensor, Memory]:
        before_time, state, before_channel = memory
        at, block = self.see, f"blocks.{layer}."
        x = at(f"{block}hook_resid_pre", x)
        into_time = at(f"{block}rwkv.hook_in", self.norm(x, f"{block}ln1", f"{block}ln1"))
        mixed, state = self.time_mix(into_time, before_time, state, layer)
        x = at(f"{block}hook_resid_mid", x + at(f"{block}hook_attn_out", mixed))
        into_channel = at(f"{block}mlp.hook_in", self.norm(x, f"{block}ln2", f"{block}ln2"))
        mixed = self.channel_mix(into_channel, before_channel, f"{block}")
        x = at(f"{block}hook_resid_post", x + at(f"{block}hook_mlp_out", mixed))
        return x, (into_time, state, into_channel)

    def channel_mix(self, x: Tensor, before: Tensor, block: str) -> Tensor:
        w, at, delta = self.w, self.see, before - x
        into_k = x + delta * w[f"{block}ffn.{'time_maa_k' if self.version == 6 else 'x_k'}"]
        pre = at(f"{block}mlp.hook_pre", w[f"{block}ffn.key.weight"] @ into_k)
        post = at(f"{block}mlp.hook_post", torch.where(pre > 0, pre**2, 0))
        if self.version == 7:
            return at(f"{block}mlp.hook_out", w[f"{block}ffn.value.weight"] @ post)
        into_r = x + delta * w[f"{block}ffn.time_maa_r"]
        receptance = at(f"{block}mlp.hook_receptance", _sigmoid(w[f"{block}ffn.receptance.weight"] @ into_r))
        return receptance * at(f"{block}mlp.hook_out", w[f"{block}ffn.value.weight"] @ post)

    def time_mix(self, x: Tensor, before: Tensor, state: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        w, name = self.w, f"blocks.{layer}.rwkv.hook_"
        att = f"blocks.{layer}.att."
        of = (self.finch if self.version == 6 else self.goose)(x, before, layer)
        read, state = self.recur(of, state, w[att + self.u], layer)
        read = self.see(f"{name}wkv", read)
        z = []
        for h in range(self.n_heads):
            centred = read[h] - read[h].mean()
            channels = slice(h * self.d_head, (h + 1) * self.d_head)
            normed = centred / ((centred**2).mean() + _GROUP_NORM_EPS) ** 0.5
            normed = normed * w[f"{att}ln_x.weight"][channels] + w[f"{att}ln_x.bias"][channels]
            if self.version == 7:
                normed = normed + (of["r"][h] * of["k"][h] * w[f"{att}r_k"][h]).sum() * of["v"][h]
            z.append(normed * of["g"][h])
        out = w[f"{att}output.weight"] @ self.see(f"{name}z", torch.stack(z)).flatten()
        return self.see(f"{name}out", out), state

    def recur(self, of: Mapping[str, Tensor], state: Tensor, u: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """What is read from the state, and the one that is handed on, head by head."""
        position = self.see.position
        factors = self.writes[layer][position].double() if layer in self.writes else torch.ones(self.n_heads)
        read, written = [], []
        for h in range(self.n_heads):
            r, k, v, decay = (of[kind][h] for kind in ("r", "k", "v", "decay"))
            write = torch.outer(k, v)
            if self.version == 6:
                read.append(r @ (torch.diag(u[h]) @ write + state[h]))
                written.append(torch.diag(decay) @ state[h] + factors[h] * write)
            else:
                kk, a = of["kk"][h], of["a"][h]
                removed = torch.outer(kk * a, kk @ state[h])
                written.append(torch.diag(decay) @ state[h] - removed + factors[h] * write)
                read.append(r @ written[-1])
        state = torch.stack(written)
        if (layer, position) in self.states:
            state = self.states[layer, position](state.clone()).double()
        return torch.stack(read), state

    def at(self, layer: int, kind: str, x: Tensor) -> Tensor:
        return self.see(f"blocks.{layer}.rwkv.hook_{kind}", x.view(self.n_heads, self.d_head))

    def finch(self, x: Tensor, before: Tensor, layer: int) -> dict[str, Tensor]:
        """RWKV-6: token shift, receptance, key, value, gate and decay. Peng et al. 2024, section 4."""
        w = self.att(layer)
        delta = before - x
        five = torch.tanh((x + delta * w["time_maa_x"]) @ w["time_maa_w1"]).view(5, -1)
        into = {c: x + delta * (w[f"time_maa_{c}"] + five[n] @ w["time_maa_w2"][n]) for n, c in enumerate("wkvrg")}
        omega = w["time_decay"] + torch.tanh(into["w"] @ w["time_decay_w1"]) @ w["time_decay_w2"]
        gate = w["gate.weight"] @ into["g"]
        return {
            "r": self.at(layer, "r", w["receptance.weight"] @ into["r"]),
            "k": self.at(layer, "k", w["key.weight"] @ into["k"]),
            "v": self.at(layer, "v", w["value.weight"] @ into["v"]),
            "g": self.at(layer, "g", gate * _sigmoid(gate)),
            "decay": self.at(layer, "decay", torch.exp(-torch.exp(omega))),
        }

    def goose(self, x: Tensor, before: Tensor, layer: int) -> dict[str, Tensor]:
        """RWKV-7: receptance, key, value, gate, decay, removal key and learning rate. Peng et al. 2025, section 4."""
        w = self.att(layer)
        into = {c: x + (before - x) * w[f"x_{c}"] for c in "rwkvag"}
        omega = w["w0"] + torch.tanh(into["w"] @ w["w1"]) @ w["w2"]
        a = self.at(layer, "a", _sigmoid(w["a0"] + into["a"] @ w["a1"] @ w["a2"]))
        k = w["key.weight"] @ into["k"]
        v = w["value.weight"] @ into["v"]
        if layer > 0:
            v = v + (self.v_first - v) * _sigmoid(w["v0"] + into["v"] @ w["v1"] @ w["v2"])
        v = self.at(layer, "v", v)
        if layer == 0:
            self.v_first = v.flatten()
        kk = [head / (head**2).sum() ** 0.5 for head in (k * w["k_k"]).view(self.n_heads, self.d_head)]
        return {
            "r": self.at(layer, "r", w["receptance.weight"] @ into["r"]),
            "decay": self.at(layer, "decay", torch.exp(-(_E**-0.5) * _sigmoid(omega))),
            "a": a,
            "kk": self.at(layer, "kk", torch.stack(kk)),
            "k": self.at(layer, "k", k * (1 + (a.flatten() - 1) * w["k_a"])),
            "v": v,
            "g": self.at(layer, "g", _sigmoid(into["g"] @ w["g1"]) @ w["g2"]),
        }

    def att(self, layer: int) -> dict[str, Tensor]:
        """The weights of time mixing."""
        att = f"blocks.{layer}.att."
        return {name.removeprefix(att): tensor for name, tensor in self.w.items() if name.startswith(att)}


def effective_attention(
    values: Mapping[str, Tensor], tensors: Mapping[str, Tensor], version: int, layer: int
) -> Tensor:
    """What `rwkv.hook_effective_attn` says of a layer with these `values`, be they those of a `Naive` or captured ones:
    how much of each value is read, [head, query, key].

    RWKV-6: α[t, t] = Σ r_t u k_t and α[t, s] = Σ_j r_t[j] k_s[j] Π_{s < τ < t} d_τ[j]. RWKV-7: r_t is carried back
    through one transition of the state after the other, to the key of each earlier token.
    """
    name = f"blocks.{layer}.rwkv.hook_"
    of = {kind: values[name + kind].double() for kind in ("r", "k", "decay", *(("kk", "a") if version == 7 else ()))}
    n_positions, n_heads, _ = of["r"].shape
    alpha = torch.zeros(n_heads, n_positions, n_positions, dtype=torch.float64)
    for h in range(n_heads):
        r, k, decay = (of[kind][:, h] for kind in ("r", "k", "decay"))
        for t in range(n_positions):
            carried = r[t]
            if version == 6:
                alpha[h, t, t] = (r[t] * tensors[f"blocks.{layer}.att.time_faaaa"][h].double() * k[t]).sum()
                for s in range(t - 1, -1, -1):
                    alpha[h, t, s] = (carried * k[s]).sum()
                    carried = carried * decay[s]
                continue
            kk, a = of["kk"][:, h], of["a"][:, h]
            alpha[h, t, t] = (carried * k[t]).sum()
            for s in range(t, 0, -1):
                carried = carried * decay[s] - (carried * kk[s] * a[s]).sum() * kk[s]
                alpha[h, t, s - 1] = (carried * k[s - 1]).sum()
    return alpha


def _sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def _without_empty_axes(x: Tensor) -> Tensor:
    """Vectors, which files keep as [1, 1, channel]."""
    return x.flatten() if x.dim() == 3 and x.shape[:2] == (1, 1) else x
