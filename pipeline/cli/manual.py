"""How the help reads: commands by what one wants, examples as they are typed, the nearest match of a typo."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from ...stores.errors import nearest


class Command(click.Command):
    """A command whose help ends with `examples`, each a line as one types it."""

    def __init__(self, *arguments: Any, examples: Sequence[str], **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.examples = tuple(examples)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_lines(formatter, "Examples", self.examples)

    @property
    def text(self) -> str:
        """What the command does: the help without its options."""
        return inspect.cleandoc(self.help or "")


class Commands(click.Group):
    """The first page: `sections` of commands by what one wants, in the order of use; `examples`; where to read on."""

    def __init__(
        self,
        *arguments: Any,
        sections: Mapping[str, Sequence[Command]],
        examples: Sequence[str],
        documentation: Sequence[str],
        **settings: Any,
    ) -> None:
        super().__init__(*arguments, **settings)
        self.sections, self.examples, self.documentation = sections, tuple(examples), tuple(documentation)
        for command in self.each():
            self.add_command(command)

    def each(self) -> Iterator[Command]:
        """The commands in the order of the first page."""
        for commands in self.sections.values():
            yield from commands

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [str(command.name) for command in self.each()]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        widest = max(map(len, self.list_commands(ctx)))
        for title, commands in self.sections.items():
            rows = [f"{command.name!s:<{widest}}  {command.short_help}" for command in commands]
            write_lines(formatter, title, rows)
        click.Command.format_options(self, ctx, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_lines(formatter, "Examples", self.examples)
        write_lines(formatter, "Documentation", self.documentation)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and name not in self.commands and not ctx.resilient_parsing:
            raise click.UsageError(f"there is no command {name!r}.{nearest(name, self.commands)}", ctx)
        return super().resolve_command(ctx, args)


def write_lines(formatter: click.HelpFormatter, title: str, lines: Sequence[str]) -> None:
    """A section of lines that are not wrapped."""
    with formatter.section(title):
        for line in lines:
            formatter.write(f"{'':>{formatter.current_indent}}{line}\n")
