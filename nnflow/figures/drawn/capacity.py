"""The pictures of `capacity`: errors over t, distances and memorised shares against n; samples."""

import math
from pathlib import Path
from typing import Any

from nnflow.figures.drawn.tiles import strip
from nnflow.figures.experiment import Document, save_both
from nnflow.sheet import BLUE, GREY, MEDIUM, ORANGE, SMALL, Sheet

_TIME = "time t (0 = noise, 1 = data)"
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
_BARS: dict[str, Any] = {"markersize": 10, "capsize": 6, "linewidth": 2.5}


def draw(document: Document, folder: Path) -> list[Path]:
    """Writes capacity.png and .pdf, and capacity-samples.png and .pdf."""
    networks, settings = document.results["networks"], document.settings
    sheet = Sheet(1900, 1500)
    for place, what, paths in (
        (0.08, "error", "training images"),
        (0.585, "held_out_error", "unseen images"),
    ):
        there = [network for network in networks if network[what] is not None]
        if there:
            axes = sheet.axes(place, 0.57, 0.39, 0.25)
            _draw_errors(sheet, axes, there, what, f"paths to {paths}")
    distances, shares = sheet.axes(0.08, 0.075, 0.39, 0.33), sheet.axes(0.585, 0.075, 0.39, 0.33)
    _draw_distances(sheet, distances, networks)
    _draw_shares(sheet, shares, networks)
    _, *shape = document.provenance["inputs"]["index"]["shape"]
    sheet.title(
        "Velocity u_theta of networks trained on n images, against their u*",
        f"d = {math.prod(shape):,} ({' x '.join(map(str, shape))}); "
        f"{networks[0]['parameters']:,} parameters, {networks[0]['step']:,} steps, "
        f"target {settings['target']}, training seed {', '.join(map(str, settings['seeds']))}",
    )
    note = f"mean over {settings['pairs']:,} pairs of noise and image at each t; colours: training images n"
    sheet.text(note, sheet.width / 2, 132, SMALL, width=sheet.width - 40, colour=GREY)
    return [*save_both(sheet, folder, "capacity"), *_draw_samples(document, folder)]


def _counts(networks: list[dict[str, Any]]) -> list[int]:
    return sorted({network["count"] for network in networks})


def _draw_errors(sheet: Sheet, axes: Any, networks: list[dict[str, Any]], what: str, name: str) -> None:
    counts, labelled = _counts(networks), set()
    colours = dict(zip(counts, sheet.ramp(len(counts)), strict=True))
    for network in networks:
        count, error = network["count"], network[what]
        label = None if count in labelled else f"{count:,}"
        labelled.add(count)
        axes.plot(
            error["times"],
            error["mean_squared"],
            color=colours[count],
            marker=_MARKS[counts.index(count) % len(_MARKS)],
            markersize=8,
            linewidth=2.5,
            label=label,
        )
    sheet.scale(axes, [value for network in networks for value in network[what]["mean_squared"]])
    axes.set_xlim(0, 1)
    sheet.label(axes, _TIME, "|u_theta \N{MINUS SIGN} u*|\N{SUPERSCRIPT TWO} per value")
    axes.set_title(name, fontproperties=sheet.font(MEDIUM), y=1.17)
    sheet.key(axes, columns=4)


def _draw_distances(sheet: Sheet, axes: Any, networks: list[dict[str, Any]]) -> None:
    """Median, quartiles as bars, of samples and of unseen images; side by side at each n."""
    for which, (what, name, colour, mark) in enumerate(_sets()):
        there = [network for network in networks if network[what] is not None]
        found = [network[what]["quantiles"] for network in there]
        middle = [q["p50"] for q in found]
        reach = [[q["p50"] - q["p25"] for q in found], [q["p75"] - q["p50"] for q in found]]
        where = [network["count"] * 1.08 ** (2 * which - 1) for network in there]
        axes.errorbar(where, middle, reach, label=name, color=colour, marker=mark, **_BARS)
    _count_axis(axes, networks)
    axes.set_ylim(0, None)
    sheet.label(axes, "training images n", "L2 to the nearest training image")
    sheet.key(axes, columns=1)


def _draw_shares(sheet: Sheet, axes: Any, networks: list[dict[str, Any]]) -> None:
    for which, (what, name, colour, mark) in enumerate(_sets()):
        there = [network for network in networks if network[what] is not None]
        found = [network[what]["memorised"] for network in there]
        share = [100 * m["fraction"] for m in found]
        reach = [
            [100 * (m["fraction"] - m["low"]) for m in found],
            [100 * (m["high"] - m["fraction"]) for m in found],
        ]
        where = [network["count"] * 1.08 ** (2 * which - 1) for network in there]
        axes.errorbar(where, share, reach, label=name, color=colour, marker=mark, **_BARS)
    _count_axis(axes, networks)
    axes.set_ylim(-3, 103)
    sheet.label(axes, "training images n", "memorised (%), 95 % intervals")


def _count_axis(axes: Any, networks: list[dict[str, Any]]) -> None:
    counts = _counts(networks)
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(counts, [f"{count:,}" for count in counts])


def _sets() -> tuple[tuple[str, str, str, str], ...]:
    return (
        ("near", "samples: median, quartiles", BLUE, "o"),
        ("null", "unseen images: the null", ORANGE, "s"),
    )


def _draw_samples(document: Document, folder: Path) -> list[Path]:
    """One row of samples for each network, their nearest training images below."""
    networks = document.results["networks"]
    rows = []
    for network in networks:
        name = f"n = {network['count']:,}"
        rows += [(f"{name}, seed {network['seed']}", network["samples"]), ("nearest", network["nearest"])]
    sheet = strip(
        rows,
        title="Samples of the same noise, each above its nearest training image",
        about=f"noise seeds 0 to {len(networks[0]['samples']) - 1}, {networks[0]['step']:,} training steps",
    )
    return save_both(sheet, folder, "capacity-samples")
