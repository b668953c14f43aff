"""A calibration as a picture: what each ladder's error is over time, and which one is taken when."""

from itertools import pairwise
from pathlib import Path
from typing import Any

from nnflow.calibration import CERTAIN, Calibration
from nnflow.planning import EXACT, Plan
from nnflow.sheet import BLACK, BLUE, GREY, ORANGE, SMALL, Sheet

_MOST = 6  # ladders that are told apart at a glance
# Okabe & Ito's colours, the two of `sheet` first, each with a mark of its own for grey print.
_STYLES = (
    (BLUE, "o"),
    (ORANGE, "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#56B4E9", "v"),
    ("#E69F00", "P"),
)
_TIMES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
_LEAST = 1e-6  # errors below it are drawn at it: float32 rounding
_DASHED, _DOTTED = (0, (4, 2)), (0, (1, 1.5))


def calibration_curves(calibration: Calibration, path: Path | str, *, tolerance: float) -> None:
    """Writes the 99th percentile of the relative velocity error over t, a line for each of some ladders.

    Those drawn are the ones the plan takes for most of t, then the ones measured at most times. Grey
    bands are the times at which the plan falls back to the exact field, rings the times from which on it
    takes a ladder.

    Raises:
        InputError: a tolerance that is not positive.
    """
    plan = calibration.plan(tolerance)
    ladders = drawn_ladders(calibration, plan)
    sheet = Sheet(1500, 1040)
    axes = sheet.axes(0.095, 0.1, 0.875, 0.65)
    for name, (colour, mark) in zip(ladders, _STYLES, strict=False):
        _draw_ladder(axes, calibration, name, colour, mark)
    dots = {"color": BLACK, "linewidth": 2, "linestyle": _DOTTED}
    axes.axhline(tolerance, label=f"tolerance {tolerance:g}", **dots)
    _draw_plan(axes, calibration, plan)
    _scale(axes)
    sheet.label(
        axes, "time t (0 = noise, 1 = data)", "99th percentile of |u \N{MINUS SIGN} u*| / |u*| (no unit)"
    )
    sheet.key(axes, columns=3)
    queries = min(entry.held_in.queries for entry in calibration.entries)
    about = f"{queries:,} queries on the paths to stored images at each of {len(plan.times)} times; "
    decides = "upper end of the percentile (90 % confidence)" if queries >= CERTAIN else "largest of them"
    about += f"taken where the {decides} meets the tolerance"
    sheet.title("Error of each ladder against the exact field u*, and the one taken", about)
    names = "64/30: all images by 64 coordinates, the best 30 in pixels; alone: the others are left out; "
    names += "else: what the first has not settled"
    if any(" of " in name for name in ladders):
        names += "; of 99: 99 drawn stand for all, rest of 99: for the others"
    sheet.text(names, sheet.width / 2, 132, SMALL, width=sheet.width - 40, colour=GREY)
    sheet.save(path)


def drawn_ladders(calibration: Calibration, plan: Plan) -> list[str]:
    """At most six: those of the plan by their share of t, then those measured at most times."""
    shares: dict[str, float] = {}
    for (low, high), name in zip(pairwise((0.0, *plan.times, 1.0)), plan.ladders, strict=True):
        shares[name] = shares.get(name, 0.0) + high - low
    measured: dict[str, int] = {}
    for entry in calibration.entries:
        measured[entry.ladder] = measured.get(entry.ladder, 0) + 1
    wanted = [*sorted(shares, key=lambda name: -shares[name]), *sorted(measured, key=lambda n: -measured[n])]
    return [name for name in dict.fromkeys(wanted) if name != EXACT][:_MOST]


def _draw_ladder(axes: Any, calibration: Calibration, name: str, colour: str, mark: str) -> None:
    points = sorted(
        (entry.t, max(_LEAST, entry.held_in.p99)) for entry in calibration.entries if entry.ladder == name
    )
    axes.plot(
        [t for t, _ in points],
        [error for _, error in points],
        label=name,
        color=colour,
        linewidth=2.5,
        linestyle=_DASHED if name.endswith(" alone") else "-",
        marker=mark,
        markersize=7,
    )


def _draw_plan(axes: Any, calibration: Calibration, plan: Plan) -> None:
    """Rings around the ladder taken from each time on; bands where it is the exact field."""
    found = {(entry.t, entry.ladder): entry.held_in.p99 for entry in calibration.entries}
    taken = [
        (t, max(_LEAST, found[t, name]))
        for t, name in zip(plan.times, plan.ladders[1:], strict=True)
        if name != EXACT
    ]
    ring = {"marker": "o", "markersize": 15, "markerfacecolor": "none", "markeredgewidth": 2}
    axes.plot(
        [t for t, _ in taken],
        [error for _, error in taken],
        label="taken from here on",
        color=BLACK,
        linestyle="none",
        clip_on=False,
        **ring,
    )
    label: str | None = "exact field taken"
    for (low, high), name in zip(pairwise((0.001, *plan.times, 1.0)), plan.ladders, strict=True):
        if name == EXACT:
            axes.axvspan(low, high, color=GREY, alpha=0.25, linewidth=0, label=label)
            label = None


def _scale(axes: Any) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(0.8 * _TIMES[0], 1.05)
    axes.set_xticks(_TIMES)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
