"""nnflow figures and nnflow report."""

import dataclasses
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from nnflow.cli.options import FOLDER, F, chosen_device, device_option, memory_option, new_folder
from nnflow.errors import InputError, NNFlowError
from nnflow.figures.experiment import Document, Experiment
from nnflow.figures.inputs import OPTIONS, Inputs
from nnflow.figures.registry import EXPERIMENTS
from nnflow.files import shown
from nnflow.report import write_report


@click.group()
def figures() -> None:
    """Repeat the experiments of arXiv 2506.03719 on your own images.

    Each writes NAME.json, then NAME.png and NAME.pdf drawn from it, into --out. Stopped, the same command
    goes on; with other settings it measures what these change. What is measured is kept in --out/parts, which
    may be removed once the figures are done.
    """


def _setting_options(experiment: Experiment) -> Callable[[F], F]:
    """One option for each setting, with its default."""

    def added(function: F) -> F:
        for knob in reversed(dataclasses.fields(experiment.settings)):
            name = "--" + knob.name.replace("_", "-")
            text = knob.metadata["help"][0].upper() + knob.metadata["help"][1:] + "."
            default = knob.default
            if knob.type is bool:
                option = click.option(
                    f"{name}/--no-{name[2:]}", knob.name, default=default, show_default=True, help=text
                )
            else:
                kind: Any = {int: int, float: float}.get(knob.type, str)
                if knob.metadata["choices"]:
                    kind = click.Choice(knob.metadata["choices"])
                if isinstance(default, tuple):
                    default = ",".join(f"{value:g}" for value in default)
                option = click.option(
                    name, knob.name, type=kind, default=default, show_default=default != "", help=text
                )
            function = option(function)
        return function

    return added


def _input_options(names: tuple[str, ...], *, tolerant: bool) -> Callable[[F], F]:
    """--index, --run and the others that the experiment can be given, then how u* is taken."""

    def added(function: F) -> F:
        function = device_option(memory_option(function))
        if tolerant:
            function = click.option(
                "--tolerance",
                type=click.FloatRange(min=0, min_open=True),
                default=None,
                help="Take u* by near and far within this relative error, not exactly; needs nnflow "
                "calibrate.",
            )(function)
        for name in reversed(names):
            function = click.option(
                f"--{name.replace('_', '-')}", name, type=FOLDER, default=None, help=OPTIONS[name]
            )(function)
        return function

    return added


_out = click.option("--out", type=FOLDER, required=True, help="Folder of all figures.")
_redraw = click.option("--redraw", is_flag=True, help="Draw NAME.json again, without measuring.")


def _command(experiment: Experiment) -> click.Command:
    """The command of one experiment."""

    @click.command(experiment.name, help=f"{experiment.about}\n\nThe paper: {experiment.claim}")
    @_out
    @_input_options(experiment.inputs, tolerant=experiment.tolerant)
    @_setting_options(experiment)
    @_redraw
    def command(out: Path, redraw: bool, **rest: Any) -> None:
        if redraw:
            _draw(experiment, Document.open(out / f"{experiment.name}.json"), out)
            return
        names = {knob.name for knob in dataclasses.fields(experiment.settings)}
        settings = experiment.settings.of({name: rest.pop(name) for name in names})
        document = _made(experiment, settings, _inputs(out, **rest))
        if document.missing:
            raise InputError(f"{experiment.name}: {'; '.join(document.missing)}; the rest is drawn")

    return command


def _inputs(out: Path, *, device: str | None, **rest: Any) -> Inputs:
    return Inputs(out=out, device=chosen_device(device), progress=True, **rest)


def _made(experiment: Experiment, settings: Any, inputs: Inputs) -> Document:
    new_folder(inputs.out)  # before the work, not after it: an OUT that cannot be written is told at once
    command = shlex.join(["nnflow", *sys.argv[1:]])
    document = experiment.run(settings, inputs, command=command)
    click.echo(shown(inputs.out / f"{experiment.name}.json"))
    _draw(experiment, document, inputs.out)
    return document


def _draw(experiment: Experiment, document: Document, out: Path) -> None:
    for path in experiment.pictures(document, out):
        click.echo(shown(path))
    click.echo(experiment.words(document))


@click.command("all")
@_out
@_input_options(tuple(OPTIONS), tolerant=True)
def every(out: Path, device: str | None, **rest: Any) -> None:
    """Make every figure that the inputs named allow, with its default settings, and the report.

    What one of them lacks is told at the end; the others are made all the same. Those that train networks
    are left to their own commands.
    """
    inputs = _inputs(out, device=device, **rest)
    new_folder(out)
    failed = []
    for experiment in EXPERIMENTS.values():
        if experiment.trains:
            click.echo(f"{experiment.name}: trains networks; make it by {experiment.command(out)}", err=True)
            continue
        click.echo(f"{experiment.name}: {experiment.about}", err=True)
        try:
            document = _made(experiment, experiment.settings(), inputs)
            failed += [f"{experiment.name}: {line}" for line in document.missing]
        except NNFlowError as error:
            click.echo(f"{experiment.name}: {shown(error)}", err=True)
            failed.append(f"{experiment.name}: {shown(error)}")
    click.echo(shown(write_report(out, EXPERIMENTS)))
    if failed:
        raise InputError("; ".join(failed))


for made in EXPERIMENTS.values():
    figures.add_command(_command(made))
figures.add_command(every)


@click.command()
@click.argument("folder", type=FOLDER, metavar="DIR")
def report(folder: Path) -> None:
    """Collect the figures in DIR as one page, DIR/report.html, that opens without a server.

    Figures that are not there are named with the command that makes them.
    """
    click.echo(shown(write_report(folder, EXPERIMENTS)))
