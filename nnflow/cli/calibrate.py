"""nnflow calibrate."""

import math
from pathlib import Path

import click

from nnflow.calibrating import calibrate as measure
from nnflow.calibration import FILE, Calibration, Entry
from nnflow.cli.options import FOLDER, memory_option, tolerance_option
from nnflow.curves import calibration_curves
from nnflow.files import folder_lock, shown
from nnflow.index import NeighbourIndex
from nnflow.planning import BATCH, EXACT, Plan, Stretch
from nnflow.settling import SETTLING, settling_times, write_settling
from nnflow.store import ImageStore

PICTURE = "calibration.png"


@click.command()
@click.argument("out", type=FOLDER)
@click.option(
    "--held-out",
    type=FOLDER,
    default=None,
    help="Index of images that OUT does not hold; without it, the mirror images of those it "
    "holds; of latents, none.",
)
@click.option(
    "--queries", type=click.IntRange(min=2), default=None, help="Per time; 64 to 256, as the seconds allow."
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=300.0,
    show_default=True,
    help="About how long to measure errors; settling times may take as long again.",
)
@tolerance_option("Relative velocity error that the table, the plot and the settling times are for.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the queries.")
@memory_option
def calibrate(
    out: Path, held_out: Path | None, queries: int | None, seconds: float, tolerance: float, seed: int,
    memory: int,
) -> None:  # fmt: skip
    """Measure how far off the field of the index OUT is, and how quick, for ladders of resolutions.

    At up to some 25 times the velocity by each ladder is compared with that of all images, on the paths
    from noise to images of OUT (held in) and to others (held out). near-and-far then takes the cheapest
    ladder whose error meets a tolerance. Prints the choice, and writes into OUT calibration.json,
    calibration.png and, where time allows, settling.npz: from which time on each image is alone on its path.
    """
    index = NeighbourIndex.open(out)
    others = None if held_out is None else ImageStore.open(held_out)
    written = measure_into(
        index,
        held_out=others,
        queries=queries,
        seconds=seconds,
        tolerance=tolerance,
        seed=seed,
        memory=memory,
    )
    click.echo(table(Calibration.open(index), tolerance))
    for path in written:
        click.echo(shown(path))


def measure_into(
    index: NeighbourIndex,
    *,
    held_out: ImageStore | None = None,
    queries: int | None = None,
    seconds: float,
    tolerance: float,
    seed: int,
    memory: int,
) -> list[Path]:
    """Measures settling times and errors, and writes what was found into the folder of `index`.

    The table comes last: it says that everything was done.
    """
    folder = index.folder
    written = [folder / FILE, folder / PICTURE]
    with folder_lock(folder):
        times = settling_times(index, tolerance=tolerance, memory=memory, seconds=seconds, progress=True)
        if times is not None:
            write_settling(index.store, times)
            written.append(folder / SETTLING)
        found = measure(
            index,
            held_out=held_out,
            queries=queries,
            seconds=seconds,
            seed=seed,
            memory=memory,
            progress=True,
        )
        calibration_curves(found, folder / PICTURE, tolerance=tolerance)
    return written


def exact_share(plan: Plan) -> float:
    """The share of t ~ U[0, 1] at which all images are summed in pixels."""
    return math.fsum(stretch.width for stretch in plan.stretches if stretch.ladder == EXACT)


def table(calibration: Calibration, tolerance: float) -> str:
    """One line for each measured time: the ladder from there on, its errors (%) and its price."""
    plan = calibration.plan(tolerance)
    found = {(entry.t, entry.ladder): entry for entry in calibration.entries}
    longest = max(len("ladder"), *map(len, plan.ladders))
    lines = [
        f"tolerance {tolerance:g}: relative velocity error in %, and ms per query, {BATCH} at a time",
        f"{'from t':>7}  {'ladder':<{longest}}  {'p50':>8} {'p90':>8} {'p99':>8} {'held out':>8}"
        f"  {'ms':>8} {'exact ms':>8} {'ratio':>6}",
    ]
    for t, ladder in zip(plan.times, plan.ladders[1:], strict=True):
        entries = [found[t, name] for name in (ladder, EXACT)]
        prices = [
            calibration.price([Stretch(1.0, entry.ladder, entry.seconds, entry.again)]) for entry in entries
        ]
        lines.append(f"{t:>7g}  {ladder:<{longest}}  {_row(found[t, ladder], *prices)}")
    mean, whole = calibration.price(plan.stretches), calibration.price(calibration.always(EXACT))
    lines.append(
        f"{BATCH} queries at t ~ U[0, 1]: {1000 * mean:.3g} ms per query, exact {1000 * whole:.3g} ms, "
        f"ratio {whole / mean:.3g}; exact field for {100 * exact_share(plan):.3g} % of t"
    )
    return "\n".join(lines)


def _row(entry: Entry, price: float, exact: float) -> str:
    inside, outside = entry.held_in, entry.held_out
    errors = [inside.p50, inside.p90, inside.p99, None if outside is None else outside.p99]
    shares = " ".join(f"{'-' if error is None else f'{100 * error:.2g}':>8}" for error in errors)
    prices = f"{1000 * price:>8.3g} {1000 * exact:>8.3g}"
    return f"{shares}  {prices} {exact / price:>6.3g}"
