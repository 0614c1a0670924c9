"""Chat templates: from messages to the text that a model was trained to see around them.

A template is a Jinja program that comes with the model, from whoever made it. It is rendered as transformers renders
it (`apply_chat_template`: same settings, globals, filters and tags), in Jinja's sandbox: it sees plain values only,
loads no other file, reaches no attribute that leads out, and changes nothing that it was given.
"""

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import ModelError, nearest

if TYPE_CHECKING:
    import jinja2

DEFAULT = "default"
"""The name of a model's only template, and of the one that is taken where none is asked for."""

_TOOL_USE = "tool_use"
_MOST_PRODUCT = 2**24


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplates:
    """The chat templates of a model as they lie in its files: nothing is parsed before `render`.

    `templates` by name, "default" where the model has one; `special` the texts of special tokens by the names that
    templates know them by (`bos_token`, `eos_token`, …); `source` the file or folder, for messages.
    """

    templates: Mapping[str, str] = field(default_factory=dict)
    special: Mapping[str, str] = field(default_factory=dict)
    source: str = "this model"

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """Give the text of a conversation, ready to be tokenised without a further BOS.

        `messages`: mappings of JSON values, usually `{"role": "user", "content": "…"}`; keys whose value is None are
        left out. With `add_generation_prompt` the text ends where the model's answer begins. `template`: the name of
        one of the model's templates, or a Jinja text of your own; None takes "tool_use" where there are tools and the
        model has such a template, else "default". `variables` (`tools`, `documents` and whatever else the template
        knows) are JSON values too, and win over the special tokens.

        Raises ModelError where the model has no template, for values that are no JSON, and where the template is no
        valid one, refuses the messages, fails on them, or tries to leave its sandbox.
        """
        text = self._choose(template, variables)
        known = {"tools": None, "documents": None, **self.special, **variables}
        values = _plain({**known, "messages": _messages(messages), "add_generation_prompt": add_generation_prompt})
        from jinja2 import TemplateError, TemplateSyntaxError
        from jinja2.exceptions import SecurityError

        try:
            return _compiled(text).render(values)
        except TemplateSyntaxError as error:
            raise ModelError(
                f"the chat template of {self.source} cannot be parsed: {error} (line {error.lineno})"
            ) from error
        except SecurityError as error:
            raise ModelError(f"the chat template of {self.source} does what no template may: {error}") from error
        except Exception as error:  # a template is a program: what it raises is up to its author
            verb = "refuses these messages" if type(error) is TemplateError else "fails on these messages"
            raise ModelError(f"the chat template of {self.source} {verb}: {error}") from error

    def _choose(self, template: str | None, variables: Mapping[str, Any]) -> str:
        if template is not None and template not in self.templates and ("{{" in template or "{%" in template):
            return template
        if not self.templates:
            raise ModelError(
                f"{self.source} has no chat template: it was not trained on conversations, or its files do not say "
                "how. Write the prompt out, or give a Jinja text as template"
            )
        name = template or (_TOOL_USE if variables.get("tools") and _TOOL_USE in self.templates else DEFAULT)
        if name not in self.templates:
            raise ModelError(
                f"{self.source} has no chat template {name!r}; its templates: {', '.join(sorted(self.templates))}."
                f"{nearest(name, self.templates)}"
            )
        return self.templates[name]


def parse_templates(value: object, where: str) -> Mapping[str, str]:
    """Read the setting `chat_template` of a tokenizer_config.json: one text, or a list of named ones.

    Raises ModelError for anything else.
    """
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    try:
        named = {str(entry["name"]): str(entry["template"]) for entry in value}  # type: ignore[attr-defined]
    except (TypeError, KeyError) as error:
        raise ModelError(f"{where} has a chat_template that is neither a text nor a list of named ones") from error
    return named


def _messages(messages: object) -> list[dict[str, Any]]:
    if not isinstance(messages, Iterable) or isinstance(messages, str | Mapping):
        raise ModelError("a conversation is a list of messages, such as [{'role': 'user', 'content': 'Hello'}]")
    given = list(messages)
    if not given:
        raise ModelError("the conversation is empty: there is no message in it")
    for index, message in enumerate(given):
        if not isinstance(message, Mapping):
            raise ModelError(
                f"message {index} of the conversation is of type {type(message).__name__}; expected is a mapping such "
                "as {'role': 'user', 'content': 'Hello'}"
            )
    return [{key: value for key, value in message.items() if value is not None} for message in given]


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Give a copy made of JSON types only: an object with methods would be a way out of the sandbox."""
    plain: dict[str, Any] = {}
    for name, value in values.items():
        try:
            plain[name] = json.loads(json.dumps(value))
        except (TypeError, ValueError) as error:
            raise ModelError(f"a chat template takes JSON values only, and {name!r} is none: {error}") from error
    return plain


@functools.lru_cache(maxsize=32)
def _compiled(template: str) -> "jinja2.Template":
    return _environment().from_string(template)


@functools.cache
def _environment() -> "jinja2.Environment":
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}…{% endgeneration %}` marks what the model wrote; here it renders what it holds."""

        tags = {"generation"}  # noqa: RUF012 - the name and type are Jinja's

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class Bounded(ImmutableSandboxedEnvironment):
        """Without products that take a line to ask for and all the memory to give."""

        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if _size_of(operator, left, right) > _MOST_PRODUCT:
                raise SecurityError(f"it asks for a product of more than {_MOST_PRODUCT:,} parts")
            return super().call_binop(context, operator, left, right)

    environment = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_namespace_kind(), dict=_dictionary
    )
    return environment


def _size_of(operator: str, left: Any, right: Any) -> int:
    """How large a product would be: characters, items, or bits of a number."""
    if operator == "**":
        return left.bit_length() * right if isinstance(left, int) and isinstance(right, int) else 0
    sizes = [len(one) if isinstance(one, str | list | tuple) else one for one in (left, right)]
    return sizes[0] * sizes[1] if sizes != [left, right] and all(isinstance(n, int) for n in sizes) else 0


def _namespace_kind() -> type:
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    class PlainNamespace(Namespace):
        """Jinja's namespace without names that begin with an underscore, which Python itself looks up."""

        def __init__(self, /, *given: Any, **values: Any) -> None:
            super().__init__()
            for name, value in dict(*given, **values).items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise SecurityError(f"it sets {name!r} on a namespace")
            super().__setitem__(name, value)

    return PlainNamespace


def _dictionary(*given: Any, **values: Any) -> dict[Any, Any]:
    return dict(*given, **values)


def _raise_exception(message: object) -> None:
    from jinja2 import TemplateError

    raise TemplateError(str(message))


def _strftime_now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter writes <, > and & as escapes, for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
