"""The two figures of scripts/bench_field: what accuracy costs, and where in time each method is wrong."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nnflow.sheet import BLACK, BLUE, GREY, MEDIUM, ORANGE, SMALL, Sheet

# More of Okabe & Ito's colours; every method has a marker of its own too.
AMBER, SKY, GREEN, PURPLE = "#E69F00", "#56B4E9", "#009E73", "#CC79A7"
LEAST = 1e-5  # errors below are drawn here
WANTED = 0.01
TICKS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)  # of the second
PANELS = (0.04, 0.1, 0.2)  # times of the first figure, where they were measured


@dataclass(frozen=True)
class Row:
    """One method at one time: relative errors, seconds per 1,000 queries, that against two plain products."""

    method: str
    t: float
    p50: float
    p90: float
    p99: float
    seconds: float
    ratio: float


class Look(NamedTuple):
    """How a method is drawn; a hollow marker is a variant of the full one."""

    name: str
    colour: str
    marker: str
    hollow: bool = False
    curve: bool = False  # whether it is in the second figure


LOOKS = {
    "exact-halves": Look("exact, bf16 halves", BLACK, "s"),
    "top-100": Look("true top-100", GREY, "v", hollow=True),
    "top-1000": Look("true top-1,000", GREY, "v", curve=True),
    "faiss-100": Look("FAISS top-100", SKY, "^", hollow=True),
    "faiss-1000": Look("FAISS top-1,000", SKY, "^", curve=True),
    "efm-1000": Look("efm-m, M = 1,000", PURPLE, "D", curve=True),
    "efm-1000-no-x1": Look("efm-m without x1", PURPLE, "D", hollow=True),
    "deann": Look("DEANN", AMBER, "P", curve=True),
    "deann-scan": Look("DEANN, exact neighbours", AMBER, "P", hollow=True),
    "snis-2048": Look("Niedoba et al., 2,048 draws", GREEN, "X", curve=True),
    "snis-256": Look("Niedoba et al., 256 draws", GREEN, "X", hollow=True),
    "near-64-100": Look("near + far, 64 / 100", BLUE, "<", hollow=True),
    "near-128-300": Look("near + far, 128 / 300", BLUE, "o", curve=True),
    "near-512-100": Look("near + far, 512 / 100", BLUE, ">", hollow=True),
    "ladder": Look("ladder 64 / 3,000, 512 / 100", BLUE, "h"),
    "tolerance": Look("tolerance = 0.01", ORANGE, "*", curve=True),
}


def cost_against_error(rows: Sequence[Row], path: Path, about: str) -> None:
    """Writes p99 error against seconds per 1,000 queries, a panel for each of a few times."""
    times = sorted({row.t for row in rows})
    shown = [t for t in PANELS if t in times] or [times[len(times) // 2]]
    sheet = Sheet(1800, 1000)
    sheet.title("What an accurate velocity costs", about)
    width = 0.905 / len(shown)
    for number, t in enumerate(shown):
        axes = sheet.axes(0.1 + number * width, 0.31, width - 0.03, 0.52)
        _costs(axes, [row for row in rows if row.t == t])
        error = "relative velocity error, p99" if number == 0 else ""
        sheet.label(axes, "seconds per 1,000 queries", error)
        _finish(sheet, axes, f"t = {t:g}", first=number == 0)
    _key(sheet, axes)
    sheet.save(path)


def error_against_time(rows: Sequence[Row], path: Path, about: str) -> None:
    """Writes median and 99th percentile of the error against t, for the main methods."""
    sheet = Sheet(1800, 1000)
    sheet.title("Where in time each method is wrong", about)
    curves = {name: look for name, look in LOOKS.items() if look.curve and _of(rows, name)}
    for number, (quantity, what) in enumerate((("p50", "median"), ("p99", "99th percentile"))):
        axes = sheet.axes(0.1 + 0.46 * number, 0.29, 0.43, 0.54)
        for name, look in curves.items():
            mine = sorted(_of(rows, name), key=lambda row: row.t)
            errors = [max(getattr(row, quantity), LEAST) for row in mine]
            _draw(axes, [row.t for row in mine], errors, look, line=True)
        axes.set_xscale("log")
        axes.set_xticks([t for t in TICKS if curves and min(row.t for row in rows) <= t])
        sheet.label(axes, "time t (0 = noise, 1 = data)", "relative velocity error" if number == 0 else "")
        _finish(sheet, axes, what, first=number == 0)
    _key(sheet, axes)
    sheet.save(path)


def _of(rows: Sequence[Row], method: str) -> list[Row]:
    return [row for row in rows if row.method == method]


def _costs(axes: Any, rows: Sequence[Row]) -> None:
    """The markers of one time, and the exact field's cost as a line: its error is 0 here."""
    from matplotlib.ticker import LogLocator

    for row in rows:
        if row.method in LOOKS:
            _draw(axes, [row.seconds], [max(row.p99, LEAST)], LOOKS[row.method], line=False)
    exact = _of(rows, "exact")[0].seconds
    axes.axvline(exact, color=BLACK, linestyle=(0, (4, 3)), linewidth=2, label="cost of exact, float32")
    axes.set_xscale("log", subs=())
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    costs = [row.seconds for row in rows]
    axes.set_xlim(0.6 * min(costs), 1.6 * max(costs))


def _draw(axes: Any, x: list[float], y: list[float], look: Look, *, line: bool) -> None:
    axes.plot(
        x,
        y,
        color=look.colour,
        linestyle="-" if line else "none",
        linewidth=2.5,
        marker=look.marker,
        markersize=(13 if look.marker == "*" else 9) * (0.8 if line else 1),
        markerfacecolor="white" if look.hollow else look.colour,
        markeredgewidth=2,
        label=look.name,
        clip_on=False,
        zorder=4 if look.marker == "*" else 3,
    )


def _finish(sheet: Sheet, axes: Any, title: str, *, first: bool) -> None:
    """The error's axis in percent, named at the first panel only, and the line that is wanted."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_title(title, fontproperties=sheet.font(MEDIUM))
    axes.set_yscale("log")
    axes.set_ylim(0.7 * LEAST, 2)
    axes.set_yticks([1, 0.1, 0.01, 0.001, 1e-4, LEAST])
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{'≤ ' if value <= LEAST else ''}{100 * value:g} %")
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axhline(WANTED, color=ORANGE, linewidth=1.5, zorder=1)
    if not first:
        axes.tick_params(labelleft=False)


def _key(sheet: Sheet, axes: Any) -> None:
    """One key for the page, below all axes."""
    below = sheet.axes(0, 0, 1, 0.2)
    below.axis("off")
    handles, names = axes.get_legend_handles_labels()
    below.legend(
        handles, names, prop=sheet.font(SMALL), ncols=4, frameon=False, loc="center", handlelength=1.4
    )
