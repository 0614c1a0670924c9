"""A checkpoint as a folder: config.json, safetensors in one file or in shards, and perhaps tokenizer.json."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import Checkpoint, SpecialTokens, Vocabulary
from .errors import ModelError
from .families import family_of, parse_config
from .families.family import match_tensors, name_tensors

if TYPE_CHECKING:
    import tokenizers
    import torch

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def open_folder(folder: Path, source: str, revision: str | None) -> Checkpoint:
    """Open a folder; reads config.json and the headers of the safetensors files.

    Raises ModelError for a missing, damaged or truncated file, and for whatever in it would not be honoured.
    """
    config_path = folder / "config.json"
    values = _json(config_path)
    spec = parse_config(values, str(config_path))
    paths, index = _weight_files(folder)
    place: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        for name, shape in tensor_shapes(path).items():
            if name in place:
                raise ModelError(f"{name} stands in both {place[name].name} and {path.name} of {folder}")
            place[name], shapes[name] = path, shape
    family = family_of(values, str(config_path))
    tensor_of = name_tensors(spec, family.names)
    match_tensors(spec, tensor_of, shapes, buffers=family.buffers, where=str(folder))

    @functools.cache
    def mapped(path: Path) -> Any:
        import safetensors

        return safetensors.safe_open(str(path), framework="pt", device="cpu")

    def read(name: str) -> "torch.Tensor":
        tensor: torch.Tensor = mapped(place[tensor_of[name]]).get_tensor(tensor_of[name])
        return tensor

    return Checkpoint(
        source=source,
        revision=revision,
        files=(config_path, *index, *paths),
        spec=spec,
        reader=read,
        vocabulary=functools.cache(lambda: _vocabulary(folder, values)),
    )


def tensor_shapes(path: Path) -> Mapping[str, tuple[int, ...]]:
    """Give the shapes of the tensors in a safetensors file from its header: eight bytes of length, then JSON.

    Raises ModelError for a file that is cut off or is no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ModelError(f"{path} is no safetensors file, or its header is cut off after {size} bytes")
        try:
            header = json.loads(file.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            shapes = {name: tuple(entry["shape"]) for name, entry in tensors.items()}
            end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        except (ValueError, AttributeError, KeyError, TypeError) as error:
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
        except (KeyError, AttributeError) as error:
            raise ModelError(f"{index} has no weight_map") from error
        absent = [name for name in names if not (folder / name).exists()]
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
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path.parent} holds no {path.name}") from error
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} holds no JSON object")
    return values


def _vocabulary(folder: Path, config: Mapping[str, Any]) -> Vocabulary:
    tokenizer = _tokenizer(folder)
    path = folder / "tokenizer_config.json"
    settings = _json(path) if path.exists() else {}
    special = SpecialTokens(
        **{name: _token_id(tokenizer, f"{name}_token", settings, config) for name in ("bos", "eos", "unk")}
    )
    begins = tokenizer.encode("").ids
    return Vocabulary(
        build=functools.partial(_tokenizer, folder),
        special=special,
        add_bos=special.bos is not None and begins[:1] == [special.bos],
    )


def _token_id(
    tokenizer: "tokenizers.Tokenizer", key: str, settings: Mapping[str, Any], config: Mapping[str, Any]
) -> int | None:
    text = settings.get(key)
    text = text["content"] if isinstance(text, Mapping) else text
    if text is not None:
        return tokenizer.token_to_id(text)
    ids = config.get(f"{key}_id")  # several where several tokens end a text
    first = ids[0] if isinstance(ids, list) and ids else ids
    return first if isinstance(first, int) else None


def _tokenizer(folder: Path) -> "tokenizers.Tokenizer":
    path = folder / "tokenizer.json"
    if not path.exists():
        raise ModelError(f"{folder} holds no tokenizer.json, so texts cannot be tokenised; token ids can still be run")
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises bare Exception for a file that it cannot parse
        raise ModelError(f"{path} cannot be read: {error}") from error
