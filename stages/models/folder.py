"""A checkpoint as a folder: config.json, safetensors in one file or in shards, and perhaps a tokenizer."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .chat import DEFAULT, ChatTemplates, parse_templates
from .checkpoint import Checkpoint, SpecialTokens, Tokenizer, Vocabulary
from .errors import ModelError
from .families import check_config, parse_config
from .families.layout import match_tensors, unembedding_again
from .families.report import CompatibilityReport
from .spec import ModelSpec
from .tokenizer_json import read_tokenizer
from .world import END_OF_TEXT, WORLD_SPECIAL, WORLD_STOPS, WorldTokenizer, load_world_tokenizer
from .world_files import world_file_beside, world_file_of

if TYPE_CHECKING:
    import torch

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
MOST_HEADER_BYTES = 100_000_000
"""Of JSON that is read whole; of a safetensors file's header it is the safetensors library's own limit."""


def open_folder(folder: Path, source: str, revision: str | None) -> Checkpoint:
    """Open a folder; reads config.json and the headers of the safetensors files.

    Raises ModelError for a missing, damaged or truncated file, and for whatever in it would not be honoured. Warns with
    UnverifiedModelWarning of a model_type that is unknown.
    """
    config_path = folder / "config.json"
    values = _json(config_path)
    paths, index = _weight_files(folder)
    place, shapes = _tensors(folder, paths)
    spec, layout = parse_config(values, shapes, folder)
    parts = match_tensors(spec, layout, shapes, where=str(folder))
    again = unembedding_again(spec, layout)
    mapped = functools.cache(_map)

    def stored(name: str) -> "torch.Tensor":
        tensor: torch.Tensor = mapped(place[name]).get_tensor(name)
        return tensor

    def read(name: str) -> "torch.Tensor":
        tensor = parts[name].take(stored(parts[name].tensor))
        if name == "embed.weight" and again in place and not tensor.equal(stored(again)):
            raise ModelError(f"{folder} ties the unembedding to the embedding, but holds another one in {again}")
        return tensor

    return Checkpoint(
        source=source,
        revision=revision,
        files=(config_path, *index, *paths),
        spec=spec,
        reader=read,
        vocabulary=functools.cache(lambda: _vocabulary(folder, values, spec)),
    )


def check_folder(folder: Path) -> CompatibilityReport:
    """Report on what `open_folder` would read. Raises ModelError for a missing, damaged or truncated file."""
    return check_config(_json(folder / "config.json"), _tensors(folder, _weight_files(folder)[0])[1], folder)


def _tensors(folder: Path, paths: list[Path]) -> tuple[dict[str, Path], dict[str, tuple[int, ...]]]:
    """Give the file in which each tensor lies, and its shape."""
    place: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        for name, shape in tensor_shapes(path).items():
            if name in place:
                raise ModelError(f"{name} stands in both {place[name].name} and {path.name} of {folder}")
            place[name], shapes[name] = path, shape
    _check_index(folder / _INDEX, place)
    return place, shapes


def _check_index(index: Path, place: Mapping[str, Path]) -> None:
    """Raise ModelError for a tensor that the index, where there is one, puts in a file that does not hold it."""
    named: Mapping[str, str] = _json(index)["weight_map"] if index.exists() else {}
    for name, file in named.items():
        if place.get(name) != index.parent / file:
            instead = f"; it stands in {place[name].name}" if name in place else ""
            raise ModelError(f"{index} puts {name} in {file}, which does not hold it{instead}")


def _map(path: Path) -> Any:
    import safetensors

    try:
        return safetensors.safe_open(str(path), framework="pt", device="cpu")
    except safetensors.SafetensorError as error:
        raise ModelError(f"{path} is damaged: {error}") from error
    except RuntimeError as error:  # torch's: Linux maps no file that is larger than memory and swap together
        raise ModelError(f"{path} cannot be mapped into memory, save it in smaller shards: {error}") from error


def tensor_shapes(path: Path) -> Mapping[str, tuple[int, ...]]:
    """Give the shapes of the tensors in a safetensors file from its header: eight bytes of length, then JSON.

    Raises ModelError for a file that is cut off or is no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MOST_HEADER_BYTES):
            raise ModelError(f"{path} is no safetensors file, or its header is cut off after {size} bytes")
        try:
            header = json.loads(file.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            shapes = {name: tuple(entry["shape"]) for name, entry in tensors.items()}
            end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        except (ValueError, AttributeError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise ModelError(f"the header of {path} cannot be read: {error}") from error
    if size < 8 + length + end:
        raise ModelError(f"{path} is cut off: its header promises {8 + length + end} bytes and it has {size}")
    return shapes


def _weight_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Give the safetensors files, and the index that names them where there is one."""
    index = folder / _INDEX
    if index.exists():
        try:
            names = sorted(set(_json(index)["weight_map"].values()))
            outside = [name for name in names if Path(name).name != name]
            absent = [name for name in names if not (folder / name).is_file()]
        except (KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index} has no weight_map that gives the file of every tensor") from error
        if outside:
            raise ModelError(f"{index} names {outside[0]!r}, which is not a file of the folder itself")
        if absent:
            raise ModelError(f"{index} names {', '.join(absent)}, which the folder does not hold")
        return [folder / name for name in names], [index]
    if (folder / _SINGLE).exists():
        return [folder / _SINGLE], []
    others = sorted(path.name for pattern in ("*.bin", "*.pth", "*.pt") for path in folder.glob(pattern))
    reason = (
        f"; {', '.join(others)} would have to be unpickled, which is never done: convert to safetensors"
        if others
        else ""
    )
    raise ModelError(f"{folder} holds neither {_SINGLE} nor {_INDEX}{reason}")


def _json(path: Path) -> Any:
    try:
        if (size := path.stat().st_size) > MOST_HEADER_BYTES:
            raise ModelError(f"{path} has {size:,} bytes; at most {MOST_HEADER_BYTES:,} are read")
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path.parent} holds no {path.name}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} holds no JSON object")
    return values


def _vocabulary(folder: Path, config: Mapping[str, Any], spec: ModelSpec) -> Vocabulary:
    path = folder / "tokenizer_config.json"
    settings = _json(path) if path.exists() else {}
    build = _tokenizer(folder, settings, spec)
    tokenizer = build()
    tokenizer.no_padding()
    if isinstance(tokenizer, WorldTokenizer):
        special, begins, stops = WORLD_SPECIAL, [], list(WORLD_STOPS)
    else:
        special = SpecialTokens(
            **{name: _token_id(tokenizer, f"{name}_token", settings, config) for name in ("bos", "eos", "unk")}
        )
        begins = tokenizer.encode("").ids
        generation = folder / "generation_config.json"
        stops = _token_ids("eos_token", config)
        stops += _token_ids("eos_token", _json(generation) if generation.exists() else {})
    ids = {f"{name}_token": id_ for name, id_ in dataclasses.asdict(special).items() if id_ is not None}
    texts = {key: tokenizer.id_to_token(id_) for key, id_ in ids.items()}
    texts |= {key: _text_of(settings, key) for key in settings if key.endswith("_token")}
    return Vocabulary(
        build=build,
        special=special,
        add_bos=special.bos is not None and begins[:1] == [special.bos],
        stops=tuple(dict.fromkeys(id_ for id_ in (special.eos, *stops) if id_ is not None)),
        chat=ChatTemplates(
            templates=_templates(folder, settings),
            special={key: text for key, text in texts.items() if text is not None},
            source=str(folder),
        ),
    )


def _text_of(settings: Mapping[str, Any], key: str) -> str | None:
    text = settings.get(key)
    text = text.get("content") if isinstance(text, Mapping) else text
    return text if isinstance(text, str) else None


def _token_id(tokenizer: Tokenizer, key: str, settings: Mapping[str, Any], config: Mapping[str, Any]) -> int | None:
    text = _text_of(settings, key)
    return tokenizer.token_to_id(text) if text is not None else next(iter(_token_ids(key, config)), None)


def _token_ids(key: str, config: Mapping[str, Any]) -> list[int]:
    """Give the ids that a configuration has for a special token: several where several tokens end a text."""
    ids = config.get(f"{key}_id")
    return [id_ for id_ in (ids if isinstance(ids, list) else [ids]) if isinstance(id_, int)]


def _templates(folder: Path, settings: Mapping[str, Any]) -> Mapping[str, str]:
    """Give the chat templates by name; files of their own, the newer layout, replace those in the settings."""
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (default := folder / "chat_template.jinja").exists():
        files[DEFAULT] = default
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    return parse_templates(settings.get("chat_template"), str(folder / "tokenizer_config.json"))


def _tokenizer(folder: Path, settings: Mapping[str, Any], spec: ModelSpec) -> Callable[[], Tokenizer]:
    """Find the tokenizer: tokenizer.json, else the vocabulary of a World tokenizer, which models of RWKV may lack."""
    path = folder / "tokenizer.json"
    if path.exists():
        return functools.partial(read_tokenizer, path)
    if spec.rwkv is not None or world_file_beside(folder) is not None:
        file = world_file_of(folder, spec.d_vocab, str(folder))
        end = _text_of(settings.get("added_tokens_decoder") or {}, "0") or END_OF_TEXT
        return functools.partial(load_world_tokenizer, file, n_ids=spec.d_vocab, end=end)
    raise ModelError(f"{folder} holds no tokenizer.json, so texts cannot be tokenised; token ids can still be run")
