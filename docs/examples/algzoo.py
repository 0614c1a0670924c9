"""Takes one of AlgZoo's tiny networks apart: standard form, linear regions, ablations, roles of neurons, bits.

    python docs/examples/algzoo.py
    python docs/examples/algzoo.py --weights 2nd_argmax_4_3_1073741824_0.pth
    python docs/examples/algzoo.py --task 2nd_argmax --hidden 2 --length 2

Without weights a network of that size is trained first, in seconds, on standard normal inputs; AlgZoo's own are trained
on 2^30 sequences and are at gs://arc-ml-public/alg/zoo. Inputs and training are seeded.

Published (AlgZoo: uninterpreted models with fewer than 1,500 parameters, 2026): M2,2 has 10 parameters, M4,3 has 32.
Published (candle-mi, on AlgZoo's M2,2): at most 16 linear regions; outputs of the standard form equal to 1e-4; some
neuron with a role of |r| > 0.3.

Measured here: MEASURED
"""

from pathlib import Path

import click
import numpy as np
import torch
import xarray as xr
from rich.console import Console
from rich.table import Table

from forebay.stages.algzoo.ablation import ablate_neuron_pairs, ablate_neurons
from forebay.stages.algzoo.load import AlgZooNetwork, load_algzoo
from forebay.stages.algzoo.probing import linear_readout, probe_neurons
from forebay.stages.algzoo.regions import classify_regions, enumerate_regions
from forebay.stages.algzoo.spec import AlgZooSpec
from forebay.stages.algzoo.standardize import standardization_quality, standardize
from forebay.stages.algzoo.surprise import OracleEstimator, RegionEstimator, surprise_accounting
from forebay.stages.algzoo.tasks import evaluate, sample_inputs, targets


@click.command(help=__doc__)
@click.option("--weights", type=click.Path(path_type=Path), help="A .pth or .safetensors file of AlgZoo.")
@click.option("--task", type=click.Choice(["2nd_argmax", "argmedian", "median"]), help="2nd_argmax if it is trained.")
@click.option("--hidden", default=4, show_default=True)
@click.option("--length", type=int, help="Of the sequences: 3 if a network is trained.")
@click.option("--steps", default=3000, show_default=True, help="Of training, with 1,024 sequences each.")
@click.option("--inputs", "n_input", default=10_000, show_default=True)
@click.option("--kept", default=8, show_default=True, help="Regions that the explanation by regions keeps.")
@click.option("--seed", default=0, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("results/algzoo"), show_default=True)
def main(
    weights: Path | None,
    task: str | None,
    hidden: int,
    length: int | None,
    steps: int,
    n_input: int,
    kept: int,
    seed: int,
    output: Path,
) -> None:
    if weights is None:
        original = train(AlgZooSpec.from_task(task or "2nd_argmax", hidden, length or 3), steps, seed)
    else:
        original = load_algzoo(weights, task=task, n=length, dtype="float64")
    network = standardize(original)
    x = sample_inputs(network.spec, n_input, seed=seed + 1)
    # How far to trust the oracle is found on other inputs than those it is judged by.
    first = surprise_accounting(network, OracleEstimator(spec=network.spec), n_input=n_input, seed=seed + 2)
    confidence, scale = np.clip(first["agreement"].item(), 0.001, 0.999), first["mean_deviation"].item()
    oracle = OracleEstimator(spec=network.spec, confidence=confidence, scale=scale if network.spec.scalar else 0.1)
    seen = classify_regions(network, x)
    regions = RegionEstimator.from_regions(network, seen, most=kept)
    results = {
        "evaluation": evaluate(network, x).assign(quality_before=standardization_quality(original)),
        "regions_seen": seen,
        "regions": enumerate_regions(network),
        "ablation": ablate_neurons(network, x, by_time=True),
        "pairs": ablate_neuron_pairs(network, x),
        "probing": probe_neurons(network, seed=seed).merge(linear_readout(network, x)),
        "oracle": surprise_accounting(network, oracle, x),
        "region_estimator": surprise_accounting(network, regions, x),
    }
    xr.DataTree.from_dict(results).to_zarr(output / "algzoo.zarr", mode="w", consolidated=False)
    draw(results, output / "algzoo.png")
    Console().print(table(network, results))


def train(spec: AlgZooSpec, steps: int, seed: int) -> AlgZooNetwork:
    """A network trained by Adam to classify, or to tell the median by the mean squared error."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        rnn = torch.nn.RNN(1, spec.hidden, nonlinearity="relu", bias=False, batch_first=True)
        linear = torch.nn.Linear(spec.hidden, spec.n_output, bias=False)
    parameters = [*rnn.parameters(), *linear.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    x = torch.from_numpy(sample_inputs(spec, 64 * 1024, seed=seed).values).float()
    right = torch.from_numpy(targets(spec, x).values)
    for step in range(steps):
        some = slice(step % 64 * 1024, (step % 64 + 1) * 1024)
        made = linear(rnn(x[some, :, None])[1][0])
        wrong = (made[:, 0] - right[some]).square().mean() if spec.scalar else None
        loss = torch.nn.functional.cross_entropy(made, right[some]) if wrong is None else wrong
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    held = {f"rnn.{name}": weight for name, weight in rnn.state_dict().items()}
    return load_algzoo(held | {"linear.weight": linear.weight}, task=spec.task, n=spec.n, dtype="float64")


def draw(results: dict[str, xr.Dataset], path: Path) -> None:
    """The most frequent regions; what each neuron at each step, and each two neurons, are worth; roles at the end."""
    from matplotlib import pyplot

    from forebay import plot

    figure, axes = pyplot.subplots(2, 2, figsize=(13, 9), layout="constrained")
    plot.bars(results["regions_seen"]["fraction"][:20], title="regions", ax=axes[0, 0])
    plot.heat_map(results["ablation"]["score_change"], center=0.0, annotate=True, title="without one", ax=axes[0, 1])
    plot.heat_map(results["pairs"]["interaction"], center=0.0, annotate=True, title="without two", ax=axes[1, 0])
    last = results["probing"]["correlation"].isel(time=-1)
    plot.heat_map(last, center=0.0, annotate=True, title="roles at the last step", ax=axes[1, 1])
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def table(network: AlgZooNetwork, results: dict[str, xr.Dataset]) -> Table:
    """What was found, a line each."""
    spec, score = network.spec, results["evaluation"]["score"]
    made = Table(
        "what", "found", title=f"{spec.task}: {spec.hidden} neurons, {spec.n} steps, {spec.n_params} parameters"
    )
    made.add_row(score.attrs["long_name"], f"{score.item():.4f}")
    sizes = {name: results[name].sizes["region"] for name in ("regions", "regions_seen")}
    made.add_row("linear regions: all, seen", f"{sizes['regions']}, {sizes['regions_seen']}")
    for neuron in range(spec.hidden):
        last = results["probing"].isel(neuron=neuron, time=-1)
        lost = results["pairs"]["score_change"].isel(neuron=neuron, other=neuron).item()
        role = f"{last['best_role'].item()}, r = {last['best_correlation'].item():+.3f}"
        made.add_row(f"neuron {neuron}", f"{role}; score without it {lost:+.3f}")
    for name in ("oracle", "region_estimator"):
        found = results[name]
        told = ", ".join(f"{key} {found[f'{key}_bits'].item():,.0f}" for key in ("explanation", "residual", "baseline"))
        made.add_row(found.attrs["estimator"], f"agreement {found['agreement'].item():.4f}; bits: {told}")
    return made


if __name__ == "__main__":
    main()
