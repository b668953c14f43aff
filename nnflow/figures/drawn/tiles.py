"""Rows of small images with a name each: what several experiments show of their samples."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from nnflow.figures.pictures import from_text
from nnflow.sheet import GREY, MEDIUM, SMALL, Sheet
from nnflow.store import to_uint8

TILE = 96  # pixels across a tile, about: each pixel of an image is repeated
_GAP, _TOP, _LEFT = 6, 190, 300


def strip(
    rows: Sequence[tuple[str, Sequence[str]]],
    *,
    title: str,
    about: str,
    heads: Sequence[str] = (),
    below: int = 0,
    width: int = 0,
) -> Sheet:
    """A page with `rows` of images, each as `pictures.to_text` wrote them, under a title.

    Args:
        rows: a name and images; each row as many.
        title: first line.
        about: second line.
        heads: above the columns.
        below: pixels left free at the bottom, for axes.
        width: of the page at least, in pixels.
    """
    columns = len(rows[0][1])
    tiles = [[_tile(text) for text in images] for _, images in rows]
    side = tiles[0][0].shape[0]
    wide = _LEFT + columns * (side + _GAP) + 40
    sheet = Sheet(max(wide, width, 1100), _TOP + len(rows) * (side + _GAP) + 30 + below)
    left = _LEFT + max(0, sheet.width - wide) // 2
    sheet.title(title, about)
    for column, head in enumerate(heads):
        x = left + column * (side + _GAP) + side / 2
        sheet.text(head, x, _TOP - 28, SMALL, width=side + _GAP, symbols=True)
    for row, (name, _) in enumerate(rows):
        top = _TOP + row * (side + _GAP)
        middle = left - _LEFT / 2
        size, colour = (SMALL, GREY) if name == "nearest" else (MEDIUM, "#000000")
        sheet.text(name, middle, top + side / 2, size, width=_LEFT - 30, colour=colour, symbols=True)
        for column, tile in enumerate(tiles[row]):
            sheet.tile(tile, left + column * (side + _GAP), top)
    return sheet


def _tile(text: str) -> UInt8[np.ndarray, "h w 3"]:
    """(h, w, 3) uint8 of an image, every pixel repeated."""
    pixels = to_uint8(from_text([text]))[0]
    times = max(1, round(TILE / pixels.shape[-1]))
    large = pixels.expand(3, -1, -1).repeat_interleave(times, 1).repeat_interleave(times, 2)
    return large.permute(1, 2, 0).numpy()
