"""Results as pictures: computes nothing, and the same result gives the same bytes.

Images keep their pixels: each is repeated a whole number of times in both directions, never
resampled.

Axes: S images, C channels (1 grey, 3 colour), H, W of one image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from nnflow.errors import InputError
from nnflow.evaluation import Evaluation, Nearness
from nnflow.files import shown
from nnflow.sheet import BLUE, GREY, MEDIUM, ORANGE, SMALL, Sheet
from nnflow.store import to_uint8

TILE, THUMBNAIL = 160, 128  # pixels an image is enlarged to, about, in `comparison` and in a grid
PIXELS, LATENTS = "pixels in [\N{MINUS SIGN}1, 1]", "scaled latents"


@dataclass(frozen=True, kw_only=True)
class Column:
    """One field's samples, one for each seed, and the training image nearest to each.

    Attributes:
        name: the heading; u*, u_theta and tau in it are set as symbols.
        images: in [-1, 1].
        nearest: in [-1, 1].
        distances: L2 between the two.
    """

    name: str
    images: Float[Tensor, "S C H W"]
    nearest: Float[Tensor, "S C H W"]
    distances: Float[Tensor, " S"]


def sample_grid(
    images: Tensor, path: Path | str, *, columns: int, captions: Sequence[str] | None = None
) -> None:
    """Writes `images` to `path` in rows of `columns`, in reading order, each captioned below.

    Args:
        images: float (S, C, H, W) in [-1, 1]; what lies outside is clamped.
        path: of the PNG.
        columns: images in one row.
        captions: one for each image, any text; too long ones are cut to the image's width.

    Raises:
        InputError: no images, not grey or RGB, no columns, or captions of another number.
    """
    enlarged = tiles(images, "images", target=THUMBNAIL)
    if columns < 1:
        raise InputError(f"{columns} columns: wanted at least one")
    if captions is not None and len(captions) != len(enlarged):
        raise InputError(f"{len(captions)} captions for {len(enlarged)} images: wanted one for each")
    columns = min(columns, len(enlarged))
    rows = -(-len(enlarged) // columns)
    height, width = enlarged[0].shape[:2]
    gap, line = 4, (SMALL + 8 if captions is not None else 0)
    sheet = Sheet(columns * (width + gap) + gap, rows * (height + gap + line) + gap)
    for i, tile in enumerate(enlarged):
        left = gap + i % columns * (width + gap)
        top = gap + i // columns * (height + gap + line)
        sheet.tile(tile, left, top)
        if captions is not None:
            middle = left + width / 2
            sheet.text(captions[i], middle, top + height + line / 2, SMALL - 4, width=width - 8)
    sheet.save(path)


def comparison(
    columns: Sequence[Column],
    path: Path | str,
    *,
    seeds: Sequence[int],
    n: int,
    latent: Sequence[int] | None = None,
) -> None:
    """Writes the main picture: a row for each seed, a column for each field.

    Every sample stands beside the training image nearest to it, the distance below.

    Args:
        columns: from memorised to generalised, all of the same seeds in the same order.
        path: of the PNG.
        seeds: of the noise, one for each row.
        n: training images, for the title.
        latent: (C, H, W) of the latents behind the pictures, whose distances are given; None for pixels.

    Raises:
        InputError: no columns, or columns that differ in their shapes or number of seeds.
    """
    _check_columns(columns, len(seeds))
    shape = columns[0].images.shape[1:]
    field = shape if latent is None else tuple(latent)
    values = "\N{MULTIPLICATION SIGN}".join(str(size) for size in field)
    page = _Comparison(_repeats(shape, TILE) * shape[1], _repeats(shape, TILE) * shape[2])
    sheet = Sheet(*page.size(len(columns), len(seeds)))
    sheet.title(
        "Samples and their nearest training images",
        f"n = {n:,} training images, d = {math.prod(field):,} ({values})",
        scale=page.scale,
    )
    page.draw_seeds(sheet, seeds)
    for number, column in enumerate(columns):
        page.draw_column(sheet, column, number)
    unit = PIXELS if latent is None else LATENTS
    note = f"number below a nearest image: its L2 distance to the sample, {unit}"
    place = (sheet.width / 2, sheet.height - page.foot / 2)
    sheet.text(note, *place, page.small, width=sheet.width - 40, colour=GREY)
    sheet.save(path)


def distance_histogram(evaluation: Evaluation, path: Path | str) -> None:
    """Writes the histogram of distances to the nearest training image, held-out images behind.

    Raises:
        InputError: neither samples nor held-out images were evaluated.
    """
    sets = [
        ("samples", evaluation.samples, BLUE),
        ("held-out images", evaluation.held_out, ORANGE),
    ]
    if all(near is None for _, near, _ in sets):
        raise InputError("no distances to draw: evaluate samples or held-out images first")
    sheet = Sheet(1400, 960)
    axes = sheet.axes(0.09, 0.11, 0.88, 0.62)
    for name, near, colour in sets:
        if near is not None:
            _draw_histogram(axes, name, near, colour)
    unit = PIXELS if evaluation.scaling is None else LATENTS
    sheet.label(axes, f"L2 distance to the nearest training image ({unit})", "share of the set (%)")
    axes.set_xlim(0, None)
    sheet.key(axes, columns=1)
    about = f"n = {evaluation.n:,} training images, d = {evaluation.d:,}"
    if evaluation.sample_seeds:
        about += f", sample seeds {_spans(evaluation.sample_seeds)}"
    sheet.title("Distance to the nearest training image", about)
    rule = "memorised: at most 1/3 as far from the nearest training image as from the second nearest"
    sheet.text(rule, 700, 132, SMALL, width=1360, colour=GREY)
    sheet.save(path)


def error_over_time(evaluation: Evaluation, path: Path | str) -> None:
    """Writes the error of u_theta against u* over t, on the paths to training and held-out images.

    Raises:
        InputError: no velocity was evaluated.
    """
    # Filled marks within hollow ones where the two agree.
    curves = [
        ("paths to training images", evaluation.error, BLUE, 7, BLUE),
        ("paths to held-out images", evaluation.held_out_error, ORANGE, 13, "white"),
    ]
    drawn = [(name, e, colour, size, fill) for name, e, colour, size, fill in curves if e is not None]
    if not drawn:
        raise InputError("no error to draw: evaluate a learned velocity first")
    sheet = Sheet(1800, 900)
    left, right = sheet.axes(0.085, 0.11, 0.39, 0.65), sheet.axes(0.585, 0.11, 0.39, 0.65)
    for name, error, colour, size, fill in drawn:
        line = {"color": colour, "linewidth": 2.5, "clip_on": False, "zorder": 4 - size / 13}
        marks = {"marker": "o", "markersize": size, "markerfacecolor": fill, "markeredgewidth": 2}
        left.plot(error.times, error.mean_squared, label=name, **line, **marks)
        right.plot(error.times, error.relative_p50, label=name, **line, **marks)
        right.plot(error.times, error.relative_p90, linestyle=(0, (4, 3)), **line)
    sheet.scale(left, [value for _, e, *_ in drawn for value in e.mean_squared])
    sheet.scale(right, [v for _, e, *_ in drawn for v in e.relative_p50 + e.relative_p90])
    time = "time t (0 = noise, 1 = data)"
    sheet.label(left, time, "mean squared error per dimension")
    sheet.label(right, time, "|u_theta \N{MINUS SIGN} u*| / |u*|: median, 90th percentile dashed")
    for axes in (left, right):
        axes.set_xlim(0, 1)
        sheet.key(axes, columns=2)
    about = f"n = {evaluation.n:,} training images, d = {evaluation.d:,}, "
    about += f"{drawn[0][1].pairs:,} pairs of noise and image (seed {evaluation.seed})"
    sheet.title("Velocity u_theta of the network against u*", about)
    sheet.save(path)


def _draw_histogram(axes: Any, name: str, near: Nearness, colour: str) -> None:
    memorised = near.memorised
    label = (
        f"{name}: {memorised.memorised:,} of {memorised.images:,} memorised, "
        f"{memorised.fraction:.1%} (95% interval {memorised.low:.1%} to {memorised.high:.1%})"
    )
    share = [100 * count / memorised.images for count in near.histogram.counts]
    edges = near.histogram.edges
    axes.stairs(share, edges, fill=True, color=colour, alpha=0.3)
    axes.stairs(share, edges, color=colour, linewidth=2.5, label=label)


def _spans(seeds: Sequence[int]) -> str:
    """0–63, or 0, 2, 5: runs of seeds by their ends."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and seed == runs[-1][-1] + 1:
            runs[-1][1:] = [seed]
        else:
            runs.append([seed])
    return ", ".join("\N{EN DASH}".join(map(str, run)) for run in runs)


def _check_columns(columns: Sequence[Column], seeds: int) -> None:
    if not columns or not seeds:
        raise InputError("nothing to compare: wanted at least one column and one seed")
    wanted = (seeds, *columns[0].images.shape[1:])
    for column in columns:
        shapes = {tuple(column.images.shape), tuple(column.nearest.shape)}
        if shapes != {wanted} or len(column.distances) != seeds:
            raise InputError(
                f"column {shown(column.name)!r} holds {shown(sorted(shapes))} and "
                f"{len(column.distances)} distances: wanted {wanted}, one for each of {seeds} seeds"
            )


def tiles(images: Tensor, what: str, *, target: int) -> list[np.ndarray]:
    """(h, w, 3) uint8 of each image, every pixel repeated until about `target` pixels wide."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
        raise InputError(
            f"{shown(what)} of shape {tuple(images.shape)} and {images.dtype}: "
            "wanted float (S, C, H, W) with C = 1 (grey) or 3 (RGB)"
        )
    if len(images) == 0:
        raise InputError(f"no {shown(what)}: wanted at least one")
    if not bool(images.isfinite().all()):
        raise InputError(f"{shown(what)}: NaN or infinity in them; wanted numbers in [-1, 1]")
    times = _repeats(images.shape[1:], target)
    pixels = to_uint8(images.detach().cpu().float()).expand(-1, 3, -1, -1)
    large = pixels.repeat_interleave(times, 2).repeat_interleave(times, 3)
    return list(large.permute(0, 2, 3, 1).numpy())


def _repeats(shape: Sequence[int], target: int) -> int:
    """How often each pixel of a (C, H, W) image is repeated to fill about `target` pixels."""
    return max(1, round(target / max(shape[1:])))


class _Comparison:
    """Where things stand in the main picture, in pixels, for tiles of `height` by `width`.

    Letters and gaps grow with the tiles: the whole is shown at some width, whatever the pixels.
    """

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.scale = max(1.0, max(height, width) / TILE)
        self.small, self.medium = SMALL * self.scale, MEDIUM * self.scale
        self.gap = round(6 * self.scale)
        self.left, self.top, self.foot = (round(size * self.scale) for size in (150, 234, 56))
        self.across = 2 * width + self.gap  # a sample and its nearest
        self.step_x = self.across + round(44 * self.scale)
        self.step_y = height + round(44 * self.scale)

    def size(self, columns: int, rows: int) -> tuple[int, int]:
        """Width and height of the page; never too narrow for the title."""
        width = self.left + columns * self.step_x
        return max(width, round(900 * self.scale)), self.top + rows * self.step_y + self.foot

    def draw_seeds(self, sheet: Sheet, seeds: Sequence[int]) -> None:
        """The numbers at the left, and what they are."""
        x, width, head = self.left / 2, self.left * 0.9, self.top - 22 * self.scale
        sheet.text("noise seed", x, head, self.small, width=width, colour=GREY)
        for row, seed in enumerate(seeds):
            y = self.top + row * self.step_y + self.height / 2
            sheet.text(str(seed), x, y, self.medium, width=width)

    def draw_column(self, sheet: Sheet, column: Column, number: int) -> None:
        """The heading, and below it one row for each seed."""
        x = self.left + number * self.step_x
        near = x + self.width + self.gap
        middle, head = x + self.across / 2, self.top - 74 * self.scale
        room = self.step_x - 12 * self.scale
        sheet.text(column.name, middle, head, self.medium, width=room, symbols=True)
        sheet.rule(x, x + self.across, round(self.top - 50 * self.scale))
        for name, start in (("sample", x), ("nearest", near)):
            place = (start + self.width / 2, self.top - 22 * self.scale)
            sheet.text(name, *place, self.small, width=self.width, colour=GREY)
        images = tiles(column.images, f"images of column {column.name!r}", target=TILE)
        nearest = tiles(column.nearest, f"nearest images of {column.name!r}", target=TILE)
        for row, distance in enumerate(column.distances.tolist()):
            y = self.top + row * self.step_y
            sheet.tile(images[row], x, y)
            sheet.tile(nearest[row], near, y)
            place = (near + self.width / 2, y + self.height + 18 * self.scale)
            sheet.text(f"{distance:.2f}", *place, self.small, width=self.width)
