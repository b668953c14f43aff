"""nnflow train."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from nnflow.cli.options import FOLDER, F
from nnflow.config import PRESETS, TrainConfig, resolve
from nnflow.files import shown
from nnflow.index import NeighbourIndex
from nnflow.plots import sample_grid
from nnflow.sampling import sample
from nnflow.training import train as run_training
from nnflow.unet import LearnedVelocity

_GRID_SEEDS = range(16)
_GRID_STEPS = 20


def _knobs(function: F) -> F:
    """One option for each field of `TrainConfig`; unset ones are the preset's."""
    for knob in reversed(dataclasses.fields(TrainConfig)):
        name = "--" + knob.name.replace("_", "-")
        help_text = knob.metadata["help"][0].upper() + knob.metadata["help"][1:] + "."
        if knob.type is bool:
            option = click.option(f"{name}/--no-{name[2:]}", knob.name, default=None, help=help_text)
        else:
            kind: Any = {int: int, float: float}.get(knob.type, str)
            if knob.metadata["choices"]:
                kind = click.Choice(knob.metadata["choices"])
            option = click.option(name, knob.name, type=kind, default=None, help=help_text)
        function = option(function)
    return function


@click.command()
@click.argument("index", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="Folder of the run.")
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    default="cifar10",
    show_default=True,
    help="Values of every option below that is not given.",
)
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint of the run.")
@click.option("--dry-run", is_flag=True, help="Print the resolved configuration and stop.")
@_knobs
def train(index: Path, out: Path, preset: str, resume: bool, dry_run: bool, **knobs: Any) -> None:
    """Train a U-Net on the images of INDEX, by default against their closed-form velocity.

    Several processes or GPUs: accelerate launch -m nnflow train INDEX --out ...
    """
    config = resolve(preset, {name: value for name, value in knobs.items() if value is not None})
    opened = NeighbourIndex.open(index)
    if dry_run:
        click.echo(json.dumps(config.to_json(), indent=2))
        return
    result = run_training(opened, out, config, resume=resume, progress=True, on_sample=_grids(config))
    state = "stopped" if result.interrupted else "trained"
    loss = "no step was left to take" if math.isnan(result.loss) else f"loss {result.loss:.4f}"
    click.echo(
        f"{shown(result.folder)}: {state} at step {result.step:,} of {config.steps:,}, {loss}, "
        f"{result.seconds:.0f} s; weights in {shown(result.checkpoint)}"
    )
    if result.pace is not None:
        click.echo(str(result.pace))
    if result.interrupted:
        click.echo("to go on: the same command with --resume")


def _grids(config: TrainConfig) -> Callable[[LearnedVelocity, int, Path], None]:
    """Draws 16 samples of fixed seeds, of each class in turn where the network knows classes."""

    def draw(network: LearnedVelocity, step: int, folder: Path) -> None:
        label = None
        if config.class_conditional:
            label = torch.arange(len(_GRID_SEEDS)) % network.classes
        images = sample(network, list(_GRID_SEEDS), steps=_GRID_STEPS, label=label)
        folder.mkdir(parents=True, exist_ok=True)
        sample_grid(images, folder / f"step-{step:08d}.png", columns=4)

    return draw
