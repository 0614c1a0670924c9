"""What a recurrent model predicts, and what becomes of it when its first token is never written to a state.

    python docs/examples/rwkv_inference.py --model RWKV-x070-World-0.1B.pth

RWKV-6 or RWKV-7 reads a prompt, its five likeliest next tokens are listed, and it is continued greedily. Then the write
of the first token to the state of the middle layer is left out (state knockout), and for every layer and token what
leaving that one write out does to the prediction: a map of what the model remembers of its prompt, and where.

Published (candle-mi, float32, "def fibonacci(n):\\n    "): RWKV-7 1.5B: token ids 1942, 98, 5170, 36, 42178 with logits
7.5585, 5.9269, 5.8649, 4.7785, 4.2776; RWKV-6 1.6B: 1942, 98, 5170, 42178, 36 with 4.7979, 3.1692, 2.5125, 1.9588,
1.6215. The continuation begins "if n == 0: return 0 elif n == 1".

There is no RWKV model among those measured here: the tests run this on random ones.
"""

from pathlib import Path

import click
import torch
import xarray as xr
from rich.console import Console
from rich.table import Table

import forebay
from forebay.stages.analyze.state_ablation import state_knockout_effect, state_sweep
from forebay.stages.models.model import Model


@click.command(help=__doc__)
@click.option("--model", "source", default="RWKV-x070-World-0.1B.pth", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("results/rwkv_inference"))
@click.option("--prompt", default="def fibonacci(n):\n    ")
@click.option("--position", default=0, show_default=True, help="The token that is not written.")
@click.option("--layer", type=int, help="Where it is not written; the middle layer by default.")
@click.option("--max-new-tokens", default=20, show_default=True)
def main(source: str, output: Path, prompt: str, position: int, layer: int | None, max_new_tokens: int) -> None:
    model = forebay.load_model(source)
    layer = model.spec.n_layers // 2 if layer is None else layer
    ids = model.tokenizer.to_tokens(prompt)
    logits = model.forward(ids).logits[0, -1]
    (continuation,) = model.generate(ids, max_new_tokens=max_new_tokens)
    effect = state_knockout_effect(model, ids, position, layers=layer, top=5)
    swept = state_sweep(model, ids)
    effect.to_zarr(output / "state_knockout.zarr", mode="w", consolidated=False)
    swept.to_zarr(output / "state_sweep.zarr", mode="w", consolidated=False)
    draw(swept, output)
    console = Console()
    console.print(predictions(model, logits))
    console.print("Continuation: " + repr(continuation.text))
    console.print(changes(model, effect.isel(position=-1), f"Token {position} not written in layer {layer}"))


def draw(swept: xr.Dataset, output: Path) -> None:
    """What leaving out one write does, by layer and token."""
    from matplotlib import pyplot

    from forebay import plot

    ax = plot.heat_map(swept["kl_divergence"])
    ax.figure.savefig(output / "rwkv_inference.png", dpi=120, bbox_inches="tight")
    pyplot.close(ax.figure)


def predictions(model: Model, logits: torch.Tensor) -> Table:
    """The five likeliest next tokens."""
    found = Table("token id", "token", "logit", "probability", title="Likeliest next tokens")
    probability = logits.float().softmax(-1)
    for token in logits.topk(5).indices.tolist():
        text = model.tokenizer.to_str_tokens([token])[0]
        found.add_row(str(token), repr(text), f"{float(logits[token]):.4f}", f"{float(probability[token]):.4f}")
    return found


def changes(model: Model, effect: xr.Dataset, title: str) -> Table:
    """The tokens whose probability changed most."""
    found = Table(
        "token id", "token", "before", "after", title=f"{title}: KL {float(effect['kl_divergence']):.5f} nats"
    )
    for rank in range(effect.sizes["rank"]):
        row = effect.isel(rank=rank)
        token = int(row["top_token_id"])
        text = model.tokenizer.to_str_tokens([token])[0]
        before, after = float(row["base_probability"]), float(row["changed_probability"])
        found.add_row(str(token), repr(text), f"{before:.4f}", f"{after:.4f}")
    return found


if __name__ == "__main__":
    main()
