"""The command line: verbs over recipes and runs. What a run does stands in its recipe, not in flags."""

from __future__ import annotations

import click

from . import growth, imports, looks, machine, pages, runs, shapes, sharing, upkeep
from .manual import Commands

SECTIONS = {
    "Make a run": (runs.plan, runs.run, imports.import_),
    "Look at it": (looks.status, looks.lens, looks.features, pages.report, pages.serve),
    "Keep it": (upkeep.verify, upkeep.repair, shapes.delete),
    "Grow it": (growth.append, shapes.concat, shapes.export),
    "Share it": (sharing.push, sharing.pull),
    "Models and dictionaries": (looks.hooks, runs.train, runs.index),
    "This machine": (machine.doctor, machine.completion),
}
"""The commands by what one wants, in the order of use."""

EXAMPLES = (
    "forebay run recipe.toml                 text in, labelled activations out",
    "forebay status runs/recipe              how far it is",
    "forebay lens runs/recipe --document 7   what each layer would say next",
)
DOCUMENTATION = (
    "forebay COMMAND --help                  every option, with examples",
    "docs/recipes.md                         what a recipe says",
    "docs/command-line.md                    exit codes, scripts, completion",
)


@click.group(
    "forebay",
    cls=Commands,
    sections=SECTIONS,
    examples=EXAMPLES,
    documentation=DOCUMENTATION,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="forebay", prog_name="forebay")
def main() -> None:
    """Forebay computes a language model's inner activations once, keeps them labelled on disk, and lets you ask them
    anything later.
    """
