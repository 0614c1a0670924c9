"""Texts of many scripts, and RWKV's World tokenizer as its authors' own package `rwkv` has it."""

from __future__ import annotations

import functools
from typing import Any

from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

from forebay.stages.models.world import WorldTokenizer, load_world_tokenizer
from forebay.stages.models.world_files import world_file_of_package

TEXTS = {
    "accents": "Où l'été naïf s'achève, señor — Größe, Łódź, İstanbul, Žižkov, ﬁancé.",
    "cyrillic": "Съешь же ещё этих мягких французских булок, да выпей чаю. Ђорђе, Їжак.",
    "greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. ἄνθρωπος",
    "arabic": "أَبْجَد هَوَّز، ١٢٣٤؟ لا إله إلّا",
    "hebrew": "דג סקרן שט בים מאוכזב; שָׁלוֹם",
    "devanagari": "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा — १२३",
    "thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "chinese": "天地玄黃，宇宙洪荒。日月盈昃，辰宿列张。𠀋𪚥",
    "japanese": "いろはにほへと ちりぬるを、ワガヨタレソ。ｶﾀｶﾅ",
    "korean": "키스의 고유조건은 입술끼리 만나야 하고 ᄒᆞᆫ글",
    "emoji": "🐟👩‍👩‍👧‍👦🏳️‍🌈👍🏽🇫🇷🫠 ☕︎",
    "combining": "é é̂̃ Z̷̢̛̺a̵͉͝l̴̰̈́g̶͓̀o̷͇͛ ẹ́",
    "control": "\x00\x01\x07\x08\t\x0b\x0c\r\n\r\r\n\x1b[0m\x7f\x80\x85\xa0\u2028\u2029\ufeff\ufffd",
    "code": "def f(x: int = 0) -> str:\n\treturn f'{x!r}'  # <|im_start|>\r\n}\n\n\n\n    });\n\n        ====>>>>\n",
    "spaces": " " * 1000 + "a" + " " * 127 + "\t" * 67 + "\n" * 33 + " \n" * 40 + "-" * 500 + "=" * 81,
    "planes": "\ud7ff\ue000\uffff\U00010000\U0002f800\U000e0041\U0010ffff",
}


# Functions, since hypothesis writes out the fixtures that a test takes.
@functools.cache
def theirs() -> Any:
    return TRIE_TOKENIZER(str(world_file_of_package()))


@functools.cache
def world() -> WorldTokenizer:
    return load_world_tokenizer()


def data() -> WorldTokenizer:
    """One that takes the spelling of a special token for text."""
    made = load_world_tokenizer()
    made.encode_special_tokens = True
    return made


def spans_by_hand(text: str, ids: list[int]) -> list[tuple[int, int]]:
    """The characters of each token, from the bytes that the package has for it."""
    owner = [i for i, char in enumerate(text) for _ in char.encode()]
    spans, at = [], 0
    for token_id in ids:
        beyond = at + len(theirs().idx2token[token_id])
        spans.append((owner[at], owner[beyond - 1] + 1))
        at = beyond
    assert at == len(owner)
    return spans
