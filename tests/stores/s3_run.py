"""A run in a process of its own, with settings of its own: a script for `runpy`, which hands over its names."""

import os

os.environ.update(settings)  # type: ignore[name-defined]  # noqa: F821

from forebay.pipeline.run import run

if run(recipe, folder, device="cpu").code:  # type: ignore[name-defined]  # noqa: F821
    raise SystemExit(1)
