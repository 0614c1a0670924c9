"""A transformer's block as one compiled kernel sequence: torch.compile, for shapes that never change."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from types import FunctionType

import torch
from torch import Tensor

from .attention import Sight, attention
from .errors import ModelError
from .parts import block, mlp
from .rope import LENGTH_DEPENDENT, Rotation
from .spec import ModelSpec
from .taps import At, Tap
from .weights import BlockWeights

AROUND = ("hook_resid_pre", "hook_resid_post")
"""Points at a block's edges, which a compiled block leaves to its caller."""
GRAPHS = 32
"""Compiled forms of a model's block: one a shape of batch, and of models with a window one for each kind of layer."""

Compiled = Callable[[Tensor, BlockWeights, "Rotation | None", "Tensor | None"], Tensor]


def require_compilable(spec: ModelSpec, device: torch.device | str) -> None:
    """ModelError where blocks of this model, or for this device, are not compiled: it says which and why."""
    kind = torch.device(device).type
    ropes = [rope for rope in (spec.rope, spec.sliding_rope) if rope is not None]
    reasons = {
        "a recurrent model runs its layers in chunks": spec.rwkv is not None,
        "its rotations depend on the length of each sequence": any(rope.kind in LENGTH_DEPENDENT for rope in ropes),
        "the scale of its attention depends on the layer": spec.attn_scale_by_layer,
        f"blocks are compiled for CPUs and CUDA, not for {kind}": kind not in ("cpu", "cuda"),
        "there is no C++ compiler (CXX, or g++)": kind == "cpu" and shutil.which(_cxx()) is None,
    }
    for reason, is_so in reasons.items():
        if is_so:
            raise ModelError(f"compile = true: {reason}. Leave it out")


def compiled_block(spec: ModelSpec) -> Compiled:
    """A block without hook points inside, [B, T, D] to the same; compiled when a shape first comes, which takes seconds
    to a minute, and afterwards the same kernels for every layer. Values differ from those of the uncompiled block in
    their last bits.
    """

    def run(x_BTD: Tensor, w: BlockWeights, rotation: Rotation | None, visible: Tensor | None) -> Tensor:
        attend = partial(attention, w=w, spec=spec, layer=0, sight=Sight(rotation, visible), cache=None, at={})
        return block(x_BTD, w, spec, {}, attend, partial(mlp, w=w, spec=spec, at={}))

    # torch counts forms by the object of the code: with one of its own, a model has nothing to do with those before it.
    own = FunctionType(run.__code__.replace(), run.__globals__, run.__name__, run.__defaults__, run.__closure__)
    compiled: Compiled = torch.compile(own, dynamic=False, fullgraph=True)

    def limited(x_BTD: Tensor, w: BlockWeights, rotation: Rotation | None, visible: Tensor | None) -> Tensor:
        # Beyond its limit torch would go on uncompiled without a word, and round otherwise.
        with torch._dynamo.config.patch(recompile_limit=GRAPHS, fail_on_recompile_limit_hit=True):
            try:
                return compiled(x_BTD, w, rotation, visible)
            except torch._dynamo.exc.FailOnRecompileLimitHit:
                shape = f"{x_BTD.shape[0]} × {x_BTD.shape[1]} tokens"
                raise ModelError(
                    f"compile = true: {GRAPHS} forms of the block are compiled, and a batch of {shape} would need "
                    "another. Give batches of one shape, or load the model without compile"
                ) from None

    return limited


def only_around(at: At) -> bool:
    """Whether the taps of a block lie at its edges alone."""
    return all(kind in AROUND for kind in at)


def tapped(at: At, kind: str, x_BTD: Tensor) -> Tensor:
    """The stream after a tap, where there is one."""
    tap: Tap | None = at.get(kind)
    return x_BTD if tap is None else tap(x_BTD)


def compiler_of(device: str) -> dict[str, str]:
    """What can change a bit of compiled code: the compiler's version and the vector instructions of the CPU it is for,
    or the GPU.
    """
    if device.startswith("cuda"):
        return {"triton": metadata.version("triton"), "gpu": torch.cuda.get_device_name(device)}
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    version = subprocess.run([_cxx(), "-dumpfullversion", "-dumpversion"], capture_output=True, text=True, check=False)
    return {"compiler": f"{Path(_cxx()).name} {version.stdout.strip()}", "vectors": str(pick_vec_isa())}


def _cxx() -> str:
    return os.environ.get("CXX", "g++")
