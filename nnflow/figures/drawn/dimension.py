"""The picture of `dimension`: a curve for each size with its predicted collapse; the times against d."""

from pathlib import Path
from typing import Any

from nnflow.figures.experiment import Document, save_both
from nnflow.sheet import BLACK, BLUE, ORANGE, Sheet

_TIME = "time t (0 = noise, 1 = data)"
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHED = (0, (4, 3))


def draw(document: Document, folder: Path) -> list[Path]:
    """Writes dimension.png and dimension.pdf."""
    results, settings = document.results, document.settings
    sheet = Sheet(1900, 960)
    left, right = sheet.axes(0.07, 0.115, 0.5, 0.65), sheet.axes(0.66, 0.115, 0.315, 0.65)
    _draw_shares(sheet, left, results["sizes"])
    _draw_times(sheet, right, results["sizes"])
    sheet.title(
        "The higher the dimension, the earlier u* is one image",
        f"n = {results['count']:,} images, {settings['pairs']:,} pairs of noise and image at each size "
        f"(seed {settings['seed']}); sizes: {results['resampling']}",
    )
    return save_both(sheet, folder, "dimension")


def _draw_shares(sheet: Sheet, axes: Any, sizes: list[dict[str, Any]]) -> None:
    for found, colour, mark in zip(sizes, sheet.ramp(len(sizes)), _cycled(len(sizes)), strict=True):
        share, low, high = ([100 * v for v in found[name]] for name in ("share", "low", "high"))
        axes.fill_between(found["times"], low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(
            found["times"],
            share,
            color=colour,
            linewidth=2.5,
            marker=mark,
            markersize=7,
            markevery=max(1, len(share) // 50),
            label=f"{found['size']} pixels",
        )
        axes.axvline(found["predicted"], color=colour, linewidth=2, linestyle=_DASHED)
    axes.set_xlim(0, _last(sizes))
    axes.set_ylim(0, 102)
    sheet.label(axes, _TIME, "share of cosines above 0.9 (%)")
    sheet.key(axes, columns=4)


def _draw_times(sheet: Sheet, axes: Any, sizes: list[dict[str, Any]]) -> None:
    """Measured and predicted times of each size, against its dimension."""
    curves = (
        ("aligned_from", "90 % of cosines above 0.9", BLUE, "o", "-"),
        ("collapsed_from", "half collapsed (ESS below 2)", ORANGE, "s", "-"),
        ("predicted", "collapse predicted", BLACK, "x", _DASHED),
    )
    for name, label, colour, mark, line in curves:
        points = [(_dim(found), found[name]) for found in sizes if found[name] is not None]
        axes.plot(
            [d for d, _ in points],
            [t for _, t in points],
            color=colour,
            marker=mark,
            markersize=10,
            markeredgewidth=2.5,
            linewidth=2.5,
            linestyle=line,
            label=label,
        )
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks([_dim(found) for found in sizes], [f"{_dim(found):,}" for found in sizes])
    axes.set_ylim(0, None)
    sheet.label(axes, "dimension d (values of one image)", "time t")
    sheet.key(axes, columns=1)


def _dim(found: dict[str, Any]) -> int:
    _, channels, height, width = found["shape"]
    return int(channels * height * width)


def _last(sizes: list[dict[str, Any]]) -> float:
    """A little after the last curve has risen, at most 1."""
    risen = [1.0 if found["aligned_from"] is None else found["aligned_from"] for found in sizes]
    return min(1.0, max([1.5 * max(risen), *(1.2 * found["predicted"] for found in sizes), 0.1]))


def _cycled(count: int) -> list[str]:
    return [_MARKS[i % len(_MARKS)] for i in range(count)]
