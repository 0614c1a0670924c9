"""The command line: verbs over recipes and runs. What a run does stands in its recipe, not in flags."""

from __future__ import annotations

import click

from . import growth, looks, pages, runs, shapes, upkeep


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="forebay")
def main() -> None:
    """Compute a language model's activations once, keep them labelled, ask them anything later.

    \b
    forebay plan RECIPE      what a run would do: units, bytes, time
    forebay run RECIPE       do it, or go on with it
    forebay append RUN FILE  more text for a run that is there
    forebay status RUN       how far it is
    forebay lens RUN         a first look: what each layer would say next
    forebay features RUN     what its dictionaries' features fire at
    forebay report RUN       all of it as a page to look at
    """


for command in (
    runs.plan,
    runs.run,
    runs.train,
    runs.index,
    looks.status,
    looks.features,
    looks.hooks,
    looks.lens,
    pages.report,
    upkeep.verify,
    upkeep.repair,
    growth.append,
    shapes.concat,
    shapes.export,
    shapes.delete,
):
    main.add_command(command)
