"""The command line: parse, build, call, write. What it computes lives elsewhere."""

import sys
import warnings
from collections.abc import Sequence

import click

from nnflow.cli.calibrate import calibrate
from nnflow.cli.classifier import classifier
from nnflow.cli.evaluate import evaluate
from nnflow.cli.figures import figures, report
from nnflow.cli.index import index, info
from nnflow.cli.sample import sample
from nnflow.cli.train import train
from nnflow.errors import DegradedWarning, NNFlowError
from nnflow.files import shown

__all__ = ["cli", "main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="nnflow")
def cli() -> None:
    """The closed-form velocity of flow matching on your own images.

    \b
    nnflow index photos/ OUT --size 32        from images to an index
    nnflow train OUT --out runs/a             a network trained on the closed form
    nnflow sample --index OUT --run runs/a --field empirical,learned --out samples/a
    nnflow evaluate --index OUT --run runs/a --samples samples/a --out evaluation/a
    nnflow figures all --index OUT --run runs/a --out figures     the paper's experiments
    """  # noqa: D301 - click wants the character itself


for command in (index, info, calibrate, train, sample, classifier, evaluate, figures, report):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; what the user can mend becomes one line on stderr and exit code 2."""
    warnings.showwarning = _note
    try:
        code = cli.main(args=None if arguments is None else list(arguments), standalone_mode=False)
    except click.exceptions.Abort:
        _fail("interrupted; the same command continues where that is possible", 130)
    except click.ClickException as error:
        hint = ""
        if isinstance(error, click.UsageError) and error.ctx is not None:
            hint = f"; see: {error.ctx.command_path} --help"
        _fail(error.format_message().replace("\n", " ") + hint)
    except NNFlowError as error:
        _fail(str(error))
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int = 2) -> None:
    click.echo(f"nnflow: error: {shown(message)}", err=True)
    sys.exit(code)


def _note(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,  # noqa: ARG001
    line: str | None = None,
) -> None:
    if issubclass(category, DegradedWarning):
        click.echo(f"nnflow: note: {shown(message)}", err=True)
    else:
        click.echo(warnings.formatwarning(message, category, filename, lineno, line), err=True, nl=False)
