"""Loads a model whose model_type forebay does not know, by its settings and the names of its tensors.

    python docs/examples/auto_config.py --model HuggingFaceTB/SmolLM2-135M-Instruct
    python docs/examples/auto_config.py --model EleutherAI/pythia-14m --as something_new

Shows the keys of config.json, what forebay makes of them, and runs the token ids 1 to 5. With `--as` the model is read
as if it called itself something else: a copy of the configuration beside links to the weights. A checkpoint that cannot
be read is answered with everything that stands in the way, and with exit code 1.

Published (candle-mi's run of the same): a Llama is read; allenai/OLMo-1B-hf, whose norms have no weights, and
EleutherAI/pythia-1.4b, whose tensors have other names, are refused with the reasons. forebay knows both families:
under another name the first is refused for the same reason, and the second is read.

Measured: SmolLM2-135M-Instruct (its Q4_1 weights, as bfloat16, with a config.json like its makers') with
`--as something_new`: read as a relative of llama, everything but three conventions inferred; after the ids 1 to 5 it
predicts 29, 29, 79, 79, 29, as it does when its GGUF file is loaded.
"""

import json
import tempfile
import warnings
from pathlib import Path

import click
import numpy as np
import xarray as xr
from rich.console import Console
from rich.table import Table

import forebay
from forebay.stages.models.errors import ModelError, UnverifiedModelWarning

TOKEN_IDS = [1, 2, 3, 4, 5]


@click.command(help=__doc__)
@click.option(
    "--model", "source", default="HuggingFaceTB/SmolLM2-135M-Instruct", show_default=True, help="Or a folder."
)
@click.option("--as", "model_type", help="Read it as a model of this model_type.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("results/auto_config"), show_default=True)
def main(source: str, model_type: str | None, output: Path) -> None:
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            folder = Path(forebay.check_compatibility(source).where)  # what is on the hub is fetched first
        except ModelError as refusal:
            raise click.ClickException(str(refusal)) from refusal
        if model_type is not None:
            folder = renamed(folder, model_type, Path(scratch))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        console.print(keys(config))
        report = forebay.check_compatibility(folder)
        console.print(str(report), markup=False, highlight=False, soft_wrap=True)
        if not report.compatible:
            raise SystemExit(1)
        result = run(folder, known=report.known)
    result.attrs |= {"source": source, "model_type": str(report.model_type), "resembles": report.resembles}
    result.to_zarr(output / "auto_config.zarr", mode="w", consolidated=False)
    draw(result, output / "auto_config.png")
    console.print(
        f"logits {dict(result['hook_logits'].sizes)}, most probable next: {result['prediction'].values.tolist()}"
    )


def renamed(folder: Path, model_type: str, scratch: Path) -> Path:
    """A folder beside in which the model calls itself otherwise; nothing but config.json is copied."""
    for file in folder.iterdir():
        (scratch / file.name).symlink_to(file.resolve())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"model_type": model_type}
    config.pop("architectures", None)
    (scratch / "config.json").unlink()
    (scratch / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return scratch


def run(folder: Path, known: bool) -> xr.Dataset:
    """Logits and the norm of the residual stream after every layer, of the token ids 1 to 5."""
    with warnings.catch_warnings():
        if not known:  # what the warning says was printed with the report
            warnings.simplefilter("ignore", UnverifiedModelWarning)
        model = forebay.load_model(folder)
    hooks = forebay.HookSpec().capture("blocks.*.hook_resid_post", "hook_logits")
    captures = model.forward([TOKEN_IDS], hooks).to_dataset().isel(sequence=0)
    size = np.sqrt((captures["hook_resid_post"] ** 2).sum("d_model"))
    size.attrs = {"long_name": "length of the residual stream", "units": "L2 norm"}
    logits = captures["hook_logits"]
    return xr.Dataset({"hook_logits": logits, "resid_norm": size, "prediction": logits.argmax("vocab")})


def draw(result: xr.Dataset, path: Path) -> None:
    from matplotlib import pyplot

    from forebay import plot

    axes = plot.heat_map(result["resid_norm"], title="token ids 1 to 5")
    axes.figure.savefig(path, dpi=120)
    pyplot.close(axes.figure)


def keys(config: dict[str, object]) -> Table:
    """The settings in config.json."""
    table = Table("key", "value", title="config.json")
    for key, value in sorted(config.items()):
        text = json.dumps(value)
        table.add_row(key, text if len(text) <= 80 else f"{text[:77]}...")
    return table


if __name__ == "__main__":
    main()
