"""A model that is small and real, and recipes over it: what the tests of stages and pipeline start from."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes is the machine's affair.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

PARAGRAPH = """
It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife.
However little known the feelings or views of such a man may be on his first entering a neighbourhood, this truth is so
well fixed in the minds of the surrounding families, that he is considered as the rightful property of some one or other
of their daughters. "My dear Mr. Bennet," said his lady to him one day, "have you heard that Netherfield Park is let at
last?" Mr. Bennet replied that he had not. "But it is," returned she; "for Mrs. Long has just been here, and she told me
all about it." Mr. Bennet made no answer. "Do not you want to know who has taken it?" cried his wife impatiently. "You
want to tell me, and I have no objection to hearing it." This was invitation enough.
""".replace("\n", " ").strip()

END = "<|endoftext|>"

# A model that is not on this machine is refused at once, and never looked for on a network.
os.environ["HF_HUB_OFFLINE"] = "1"


# Files whose few tests take long, so that no process is left with one of them when the others have nothing to do.
LONGEST = ("test_notebooks.py", "test_kill.py", "test_docs_examples.py", "test_house.py", "test_training_kill.py")
LONGEST += ("test_real_weights.py", "test_agrees_with_transformers.py", "test_determinism.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those files first, then those with the most tests: `scripts/test` hands out files in this order."""
    n_tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name not in LONGEST, -n_tests[item.path], str(item.path)))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """A recipe may set the number of torch's threads, which is the process's: no test leaves another one behind."""
    before = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    yield
    if before is not None:
        sys.modules["torch"].set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of 3 layers, as transformers saves it, and a byte-level BPE of 300 tokens.

    No two sizes are equal, four query heads share two key-value heads, and the heads together are wider than the
    residual stream, so that a mixed-up dimension cannot go unnoticed. Weights are large enough for layers to differ.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    n_vocab = _train_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=n_vocab,
        hidden_size=28,
        intermediate_size=44,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(20_240_229)
        model = LlamaForCausalLM(config)
        for name, weight in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(weight, 0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def _train_tokenizer(folder: Path) -> int:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator([PARAGRAPH], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": END, "eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return int(tokenizer.get_vocab_size())


@pytest.fixture
def altered_model(tiny_model: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], None]], Path]:
    """Makes a copy of the tiny model whose weights, by the names of its checkpoint, a function has changed."""
    from safetensors.torch import load_file, save_file

    def make(change: Callable[[dict[str, Any]], None]) -> Path:
        folder = tmp_path / "altered-llama"
        shutil.copytree(tiny_model, folder)
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Fifteen documents cut from a paragraph: from one character to fifty words, one empty. About 700 tokens."""
    words = PARAGRAPH.split()
    lengths = [3, 1, 17, 50, 0, 8, 2, 29, 11, 5, 40, 1, 7, 23, 4]
    cut = [" ".join(words[3 * i :][:n]) for i, n in enumerate(lengths)]
    cut[1], cut[11] = "zwölf 🐟", "I"
    return cut


@pytest.fixture
def make_recipe(tiny_model: Path, texts: list[str], tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe, and beside it a corpus of JSON lines, into the test's folder and gives the recipe's path.

    `make_recipe(name, texts=…, model=…, tokenize={…}, capture={…}, encode={…}, train={…})`: keys of the tables
    [tokenize] and [capture] beyond the defaults, which keep the residual stream of all layers from packed windows of 16
    tokens in units of 64; `capture=None` leaves the table out. `encode` and `train` hold a table for each name.
    """

    def lines(table: str, keys: dict[str, Any]) -> Iterator[str]:
        # A JSON value is a TOML value, null and objects excepted.
        yield f"[{table}]\n"
        yield from (f"{key} = {json.dumps(value)}\n" for key, value in keys.items() if not isinstance(value, dict))
        for key, value in keys.items():
            if isinstance(value, dict):
                yield from lines(f"{table}.{key}", value)

    def make(
        name: str = "recipe",
        *,
        texts: Sequence[str] = texts,
        model: str | Path = tiny_model,
        tokenize: dict[str, Any] | None = None,
        capture: dict[str, Any] | None = {},  # noqa: B006 - None has a meaning of its own
        encode: dict[str, dict[str, Any]] | None = None,
        train: dict[str, dict[str, Any]] | None = None,
    ) -> Path:
        corpus = tmp_path / f"{name}.jsonl"
        corpus.write_text("".join(json.dumps({"id": f"doc-{i}", "text": t}) + "\n" for i, t in enumerate(texts)))
        tables = {
            "corpus": {"files": [corpus.name]},
            "model": {"source": str(model)},
            "tokenize": {"context": 16, **(tokenize or {})},
        }
        if capture is not None:
            tables["capture"] = {"hooks": ["blocks.*.hook_resid_post"], "unit_tokens": 64, **capture}
        named = {"train": train or {}, "encode": encode or {}}
        tables |= {f"{kind}.{key}": keys for kind, held in named.items() for key, keys in held.items()}
        path = tmp_path / f"{name}.toml"
        path.write_text("\n".join("".join(lines(table, keys)) for table, keys in tables.items()))
        return path

    return make


@pytest.fixture
def start_forebay(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the command line in a process of its own, in the test's folder, and ends what is left of it afterwards."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str | Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "forebay", *map(str, arguments)],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def fork_run() -> Callable[[Path, Path], Any]:
    """Starts `forebay.run(recipe, folder)` in a process that has everything imported: a tenth of a second, not seconds.

    Gives a `multiprocessing.Process`. It is the child of a server that has never run a parallel region of OpenMP, as a
    fork of the tests' own process would be.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["forebay.pipeline.run", "forebay.stages.models.load", "forebay.stores.tree"])
    first = context.Process(target=int)  # the server imports when it is first needed
    first.start()
    first.join()

    def start(recipe: Path, folder: Path) -> Any:
        from forebay.pipeline.run import run

        process = context.Process(target=run, args=(recipe, folder), kwargs={"device": "cpu"}, daemon=True)
        process.start()
        return process

    return start


@pytest.fixture(scope="session")
def fork_forebay(fork_run: Callable[[Path, Path], Any]) -> Callable[..., Any]:
    """Starts the command line, `fork_forebay("run", recipe, …)`, as `fork_run` starts a run. Its `exitcode` is the
    command's.
    """
    context = get_context("forkserver")

    def start(*arguments: str | Path) -> Any:
        process = context.Process(target=runpy.run_module, args=("forebay", None, "__main__"), daemon=True)
        own, sys.argv = sys.argv, ["forebay", *map(str, arguments)]  # which a child is told
        try:
            process.start()
        finally:
            sys.argv = own
        return process

    return start
