"""Trains SAELens' or dictionary_learning's autoencoder on the activations of a run, with their own trainers.

    python docs/examples/feed_another_trainer.py runs/smollm2 saes/smollm2 --with sae-lens
    python docs/examples/feed_another_trainer.py runs/smollm2 saes/smollm2 --with dictionary-learning

Either library is installed by whoever runs this: `pip install sae-lens`, or
`pip install git+https://github.com/saprmarks/dictionary_learning`.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

import forebay


def rows(run: Path, hook: str, batch: int) -> Iterator[torch.Tensor]:
    """Shuffled rows of activations, float32 [batch, d], epoch after epoch, without the first position of a sequence."""
    batches = forebay.open_run(run).batches(hook, batch=batch, epochs=None, drop_last=True)
    print(batches)
    return (torch.from_numpy(found) for found in batches)


def train_with_sae_lens(data: Iterator[torch.Tensor], hook: str, args: argparse.Namespace) -> Path:
    """BatchTopK; SAELens writes it as the JumpReLU that it is afterwards."""
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    first = next(data)
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=first.shape[1],
            d_sae=args.features,
            k=args.k,
            normalize_activations="expected_average_only_in",
        )
    )
    sae.cfg.metadata.hook_name = hook
    cfg = SAETrainerConfig(
        total_training_samples=args.tokens,
        train_batch_size_samples=args.batch,
        lr=args.learning_rate,
        lr_end=args.learning_rate / 10,
        n_batches_for_norm_estimate=16,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trained = SAETrainer(cfg, sae, data_provider=data).fit()
    args.to.mkdir(parents=True)
    trained.save_inference_model(args.to)
    return args.to


def train_with_dictionary_learning(data: Iterator[torch.Tensor], hook: str, args: argparse.Namespace) -> Path:
    """BatchTopK; `trainer_0/ae.pt` and `config.json`."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
    from dictionary_learning.training import trainSAE

    steps = args.tokens // args.batch
    trainer = {
        "trainer": BatchTopKTrainer,
        "dict_class": BatchTopKSAE,
        "activation_dim": next(data).shape[1],
        "dict_size": args.features,
        "k": args.k,
        "lr": args.learning_rate,
        "steps": steps,
        "warmup_steps": steps // 20,
        "threshold_start_step": steps // 2,
        "layer": int(hook.split(".")[1]),
        "lm_name": str(args.run),
        "submodule_name": hook,
        "device": "cpu",
    }
    trainSAE(data, [trainer], steps=steps, save_dir=str(args.to), normalize_activations=True, device="cpu")
    return args.to / "trainer_0"


TRAINERS = {"sae-lens": train_with_sae_lens, "dictionary-learning": train_with_dictionary_learning}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("to", type=Path)
    parser.add_argument("--with", dest="library", choices=TRAINERS, required=True)
    parser.add_argument("--hook", default="blocks.15.hook_resid_post")
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=500_000)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args()
    folder = TRAINERS[args.library](rows(args.run, args.hook, args.batch), args.hook, args)

    dictionary = forebay.load_dictionary(folder, hook=args.hook)
    print(f"{dictionary.n_feature} features of {dictionary.hook}, {dictionary.activation.kind}, in {folder}")


if __name__ == "__main__":
    main()
