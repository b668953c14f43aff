"""The picture of `cosines`: two heat maps over t, the plane at the left, the images at the right."""

from itertools import pairwise
from pathlib import Path
from typing import Any

from nnflow.figures.experiment import Document, images_in_words, save_both
from nnflow.sheet import BLACK, ORANGE, SMALL, Sheet

_MAP = "Blues"
_TIME = "time t (0 = noise, 1 = data)"
_COSINE = "cosine of u* and x1 \N{MINUS SIGN} x0 (no unit)"


def draw(document: Document, folder: Path) -> list[Path]:
    """Writes cosines.png and cosines.pdf."""
    sheet = Sheet(1800, 940)
    places = ((0.075, "plane"), (0.535, "images"))
    shown = None
    for left, part in places:
        axes = sheet.axes(left, 0.115, 0.385, 0.655)
        shown = _draw_map(sheet, axes, document.results[part])
    bar = sheet.axes(0.937, 0.115, 0.013, 0.655)
    sheet.colour_bar(shown, bar, "share of the pairs (%)")
    settings = document.settings
    about = f"{settings['pairs']:,} pairs of noise and image (seed {settings['seed']}); orange: median, "
    about += "dotted: 0.9"
    sheet.title("Where the target of flow matching is deterministic: cosine 1", about)
    for left, part in places:
        found = document.results[part]
        name = f"{found['name']}: {images_in_words(found['shape'])}"
        middle = (left + 0.385 / 2) * sheet.width
        sheet.text(name, middle, 152, SMALL, width=0.42 * sheet.width)
    return save_both(sheet, folder, "cosines")


def _draw_map(sheet: Sheet, axes: Any, found: dict[str, Any]) -> Any:
    """The shares of each column of time; the shade is a square root, so that few pairs are seen too."""
    bins = len(found["counts"][0])
    edges = [-1 + 2 * i / bins for i in range(bins + 1)]
    times = [*found["times"], 1.0]
    share = [[100 * count / found["pairs"] for count in row] for row in zip(*found["counts"], strict=True)]
    shown = sheet.heat(axes, times, edges, share, colours=_MAP, top=100)
    middles = [(a + b) / 2 for a, b in pairwise(times)]
    axes.plot(middles, found["median"], color=ORANGE, linewidth=2.5, clip_on=False)
    axes.axhline(0.9, color=BLACK, linewidth=1.5, linestyle=(0, (1, 1.5)))
    sheet.label(axes, _TIME, _COSINE)
    axes.set_xlim(0, 1)
    axes.set_ylim(-1, 1)
    return shown
