"""nnflow classifier."""

from pathlib import Path

import click

from nnflow.classifying import ClassifierConfig, train_classifier
from nnflow.cli.options import FOLDER, chosen_device, device_option
from nnflow.files import shown
from nnflow.store import ImageStore


@click.command()
@click.argument("index", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="New folder for the classifier.")
@click.option("--held-out", type=FOLDER, default=None, help="Index of images not trained on: its accuracy.")
@click.option("--steps", type=click.IntRange(min=1), default=2500, show_default=True, help="Of descent.")
@click.option("--batch", type=click.IntRange(min=1), default=128, show_default=True, help="Images per step.")
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    default=0.1,
    show_default=True,
    help="The largest; it rises for a fifth of the steps and falls to 0.",
)
@click.option("--flip/--no-flip", default=False, show_default=True, help="Mirror at random: not for digits.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the training.")
@device_option
def classifier(
    index: Path, out: Path, held_out: Path | None, steps: int, batch: int, learning_rate: float, flip: bool,
    seed: int, device: str | None,
) -> None:  # fmt: skip
    """Train a small classifier on the classes of INDEX, for nnflow evaluate --features classifier:OUT.

    On one CPU core a minute for digits, five for CIFAR-10.
    """
    config = ClassifierConfig(steps=steps, batch=batch, learning_rate=learning_rate, flip=flip, seed=seed)
    made = train_classifier(
        ImageStore.open(index),
        out,
        config,
        held_out=None if held_out is None else ImageStore.open(held_out),
        device=chosen_device(device),
        progress=True,
    )
    right = ""
    if made.held_out is not None:
        found = made.held_out
        right = (
            f", {100 * found.fraction:.1f} % of {found.images:,} held-out images right "
            f"(95 % interval {100 * found.low:.1f} to {100 * found.high:.1f} %)"
        )
    click.echo(f"{shown(made.folder)}: trained in {made.seconds:.0f} s, loss {made.loss:.3f}{right}")
