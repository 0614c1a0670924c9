"""Takes one of AlgZoo's tiny recurrent networks apart: linear regions, ablations, roles of neurons, bits.

    python docs/examples/algzoo.py
    python docs/examples/algzoo.py --hidden 2 --length 2
    python docs/examples/algzoo.py --weights 2nd_argmax_16_10_1073741824_0.pth --no-enumerate

Without weights networks of that size are trained first, in seconds, and the best is taken; AlgZoo's own, at
gs://arc-ml-public/alg/zoo, are the best of five starts of 2^30 sequences. Inputs and training are seeded.

Published (candle-mi, on AlgZoo's M2,2): at most 16 linear regions, outputs of the standard form equal to 1e-4, a
neuron whose role it follows with |r| > 0.3, an accuracy above chance.

Measured (float64, 10,000 inputs), on networks trained here, for AlgZoo's own were not at hand. M2,2, the best of three
starts: accuracy .9999, 6 linear regions; its neurons follow Comparator(1, 0) and Comparator(0, 1) with r = .940 and
.950. "The right answer" explains it in 18 bits and leaves 24 of 10,000 bits unexplained; all its regions take 896 bits
and leave 14, those of a confidence of .999, the highest that is tried. M4,3: accuracy .961, 68 regions, of which 10,000
inputs see 59; two neurons follow Comparator(2, 1) and two Comparator(1, 2), r = .92 to .94. The right answer leaves
2,773 of 15,850 bits; the 8 most frequent regions take 2,656 and leave 5,080, nearly all for the 32 % of the inputs that
lie in none of them. Regions tell more than they cost, but in more bits than the weights take, 160 and 512 in float16.
Without any one neuron of M4,3 the accuracy falls by .56 or more.
"""

from dataclasses import replace
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
from forebay.stages.algzoo.standardize import standardize
from forebay.stages.algzoo.surprise import (
    MechanisticEstimator,
    OracleEstimator,
    RegionEstimator,
    surprise_accounting,
)
from forebay.stages.algzoo.tasks import evaluate, sample_inputs, targets


@click.command(help=__doc__)
@click.option("--weights", type=click.Path(path_type=Path), help="A .pth or .safetensors file of AlgZoo.")
@click.option("--task", help="2nd_argmax, argmedian or median. Default: what the file's name says; 2nd_argmax.")
@click.option("--hidden", default=4, show_default=True, help="Neurons, where a network is trained.")
@click.option("--length", type=int, help="Of the sequences. Default: what the file says; 3.")
@click.option("--steps", default=2000, show_default=True, help="Of training, with 1,024 sequences each.")
@click.option("--starts", default=3, show_default=True, help="Networks that are trained.")
@click.option("--enumerate/--no-enumerate", "every", default=True, help="Whether all regions are looked for.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("results/algzoo"), show_default=True)
def main(
    weights: Path | None, task: str, hidden: int, length: int, steps: int, starts: int, every: bool, output: Path
) -> None:
    if weights is None:
        spec = AlgZooSpec.from_task(task or "2nd_argmax", hidden, length or 3)
        trained = [train(spec, steps, seed) for seed in range(starts)]
        test = sample_inputs(spec, 10_000, seed=101)
        network = max(trained, key=lambda one: evaluate(one, test)["score"].item())
    else:
        network = load_algzoo(weights, task=task, n=length, dtype="float64")
    results = analyse(standardize(network), every)
    xr.DataTree.from_dict(results).to_zarr(output / "algzoo.zarr", mode="w", consolidated=False)
    draw(results, output / "algzoo.png")
    Console().print(table(network.spec, results))


def train(spec: AlgZooSpec, steps: int, seed: int) -> AlgZooNetwork:
    """A network trained by Adam to classify, or to tell the median with a small squared error."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        rnn = torch.nn.RNN(1, spec.hidden, nonlinearity="relu", bias=False, batch_first=True)
        linear = torch.nn.Linear(spec.hidden, spec.n_output, bias=False)
    optimizer = torch.optim.Adam([*rnn.parameters(), *linear.parameters()], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        x = torch.from_numpy(sample_inputs(spec, 1024, seed=1000 + step).values).float()
        right, made = torch.from_numpy(targets(spec, x).values), linear(rnn(x[..., None])[1][0])
        loss = (made[:, 0] - right).square().mean() if spec.scalar else torch.nn.functional.cross_entropy(made, right)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    held = {f"rnn.{name}": weight for name, weight in rnn.state_dict().items()}
    return load_algzoo(held | {"linear.weight": linear.weight}, task=spec.task, n=spec.n, dtype="float64")


def analyse(network: AlgZooNetwork, every: bool) -> dict[str, xr.Dataset]:
    spec = network.spec
    x, other = (sample_inputs(spec, 10_000, seed=seed) for seed in (102, 103))
    # What is explained by, and how far it is trusted, is found on other inputs than those it is judged by.
    oracle = OracleEstimator(spec=spec, **trust(network, OracleEstimator(spec=spec), other))
    frequent = classify_regions(network, other)
    kept = RegionEstimator.from_regions(network, frequent, most=8)
    kept = replace(kept, **trust(network, kept, other))
    results = {"regions": enumerate_regions(network)} if every else {}
    return results | {
        "evaluation": evaluate(network, x),
        "regions_seen": classify_regions(network, x),
        "ablation": ablate_neurons(network, x, by_time=True),
        "pairs": ablate_neuron_pairs(network, x),
        "probing": probe_neurons(network).merge(linear_readout(network, x)),
        "oracle": surprise_accounting(network, oracle, x),
        "region_estimator": surprise_accounting(network, kept, x),
    }


def trust(network: AlgZooNetwork, estimator: MechanisticEstimator, inputs: xr.DataArray) -> dict[str, float]:
    """The confidence and the scale that fit an explanation best, on those inputs of which it expects something."""
    found = surprise_accounting(network, estimator, inputs)
    if network.spec.scalar:
        return {"scale": found["mean_deviation"].item()}
    answer, prediction = found["answer"].values, found["prediction"].values
    agreement = (answer == prediction)[prediction >= 0].mean()
    return {"confidence": float(np.clip(agreement, 1e-3, 1 - 1e-3))}


def draw(results: dict[str, xr.Dataset], path: Path) -> None:
    """The most frequent regions; what each neuron at each step, and each two neurons, are worth; roles at the end."""
    from matplotlib import pyplot

    from forebay import plot

    figure, axes = pyplot.subplots(2, 2, figsize=(13, 9), layout="constrained")
    plot.bars(results["regions_seen"]["fraction"][:20], title="the most frequent linear regions", ax=axes[0, 0])
    for title, values, ax in (
        ("one neuron held at 0 at one step", results["ablation"]["score_change"], axes[0, 1]),
        ("two neurons held at 0, beyond what each does", results["pairs"]["interaction"], axes[1, 0]),
        ("what the neurons follow at the last step", results["probing"]["correlation"].isel(time=-1), axes[1, 1]),
    ):
        plot.heat_map(values, center=0.0, annotate=True, title=title, ax=ax)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def table(spec: AlgZooSpec, results: dict[str, xr.Dataset]) -> Table:
    """What was found, a line each."""
    score = results["evaluation"]["score"]
    made = Table(
        "what", "found", title=f"{spec.task}: {spec.hidden} neurons, {spec.n} steps, {spec.n_params} parameters"
    )
    made.add_row(score.attrs["long_name"], f"{score.item():.4f}")
    for name, regions in results.items():
        if "region" in regions.sizes:
            made.add_row(f"linear {name.replace('_', ' ')}", str(regions.sizes["region"]))
    for neuron in range(spec.hidden):
        last = results["probing"].isel(neuron=neuron, time=-1)
        lost = results["pairs"]["score_change"].isel(neuron=neuron, other=neuron).item()
        role = f"{last['best_role'].item()}, r = {last['best_correlation'].item():+.3f}"
        made.add_row(f"neuron {neuron}", f"{role}; score without it {lost:+.3f}")
    for found in (results["oracle"], results["region_estimator"]):
        told = ", ".join(f"{key} {found[f'{key}_bits'].item():,.0f}" for key in ("explanation", "residual", "baseline"))
        made.add_row(found.attrs["estimator"], f"agreement {found['agreement'].item():.4f}; bits: {told}")
    return made


if __name__ == "__main__":
    main()
