"""A page of tiles, letters and axes, written as PNG or PDF with the same bytes every time.

matplotlib is imported when the first page is made, used through its objects (no pyplot, no backend
to choose, no state left behind), and by this module only.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nnflow.files import disk_errors, shown, whole_file

DPI = 128  # a power of two: pixels / DPI * DPI is then exact, and no page is a pixel short
FONT, MATH = "DejaVu Sans", "dejavusans"  # of matplotlib: the same letters everywhere

# Okabe & Ito's colours, told apart by colour-blind readers and in grey print.
BLUE, ORANGE, GREY, BLACK = "#0072B2", "#D55E00", "#767676", "#000000"
FRAME = 187  # grey level of the line around a tile: a white image ends somewhere too

SMALL, MEDIUM, LARGE = 20, 24, 28  # letter heights in pixels, legible at half size

Number = int | float

_SYMBOLS = {"u_theta": r"$u_\theta$", "u*": r"$u^{*}$", "p_t": "$p_t$", "tau": r"$\tau$"}
_TOKEN = re.compile(r"\bu_theta\b|\bu\*|\bp_t\b|\btau\b")


class Sheet:
    """A white page measured in pixels from its top left corner."""

    def __init__(self, width: int, height: int) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self._pixels = np.full((height, width, 3), 255, np.uint8)
        self._figure: Any = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="none")
        self._canvas: Any = FigureCanvasAgg(self._figure)

    def axes(self, left: float, bottom: float, width: float, height: float) -> Any:
        """Axes at fractions of the page, measured from the bottom left as matplotlib does."""
        return self._figure.add_axes((left, bottom, width, height), facecolor="none")

    def label(self, axes: Any, x: str, y: str) -> None:
        """Names and units of both axes, and a quiet grid."""
        letters = {"fontproperties": self.font(MEDIUM), "math_fontfamily": MATH}
        axes.set_xlabel(_typeset(x), **letters)
        axes.set_ylabel(_typeset(y), **letters)
        axes.tick_params(which="both", labelsize=SMALL * 72 / DPI, labelfontfamily=FONT)
        axes.grid(visible=True, color="#DDDDDD", linewidth=1)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)

    def scale(self, axes: Any, values: Sequence[float], *, least: Number = 20) -> None:
        """A logarithmic y axis where positive `values` span more than a factor of `least`."""
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

        low, high = min(values), max(values)
        if not 0 < least * low < high:
            axes.set_ylim(0, None)
            return
        axes.set_yscale("log")
        few = high < 1000 * low
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))

    def key(self, axes: Any, *, columns: int) -> None:
        """The key above `axes`, where no curve can run through it."""
        axes.legend(
            prop=self.font(SMALL),
            ncols=columns,
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            frameon=False,
            borderaxespad=0.3,
            columnspacing=1.2,
        )

    def ramp(self, count: int) -> list[Any]:
        """`count` colours from dark to light for things in an order, in any print and to any eye."""
        from matplotlib import colormaps

        return [colormaps["viridis"](0.85 * i / max(1, count - 1)) for i in range(count)]

    def heat(
        self,
        axes: Any,
        x_edges: Sequence[float],
        y_edges: Sequence[float],
        values: Sequence[Sequence[float]],
        *,
        colours: str,
        top: Number,
    ) -> Any:
        """A map of `values` (rows along y) from 0 to `top`, shaded by their square roots; for `colour_bar`.

        The root shows what is a hundredth of the top at a tenth of the shade.
        """
        from matplotlib.colors import PowerNorm

        return axes.pcolormesh(
            x_edges, y_edges, values, cmap=colours, norm=PowerNorm(0.5, 0, top), rasterized=True
        )

    def colour_bar(self, shown: Any, axes: Any, name: str) -> None:
        """The scale of a map, in axes of its own."""
        bar = self._figure.colorbar(shown, cax=axes)
        bar.outline.set_visible(False)
        axes.set_ylabel(name, fontproperties=self.font(MEDIUM))
        axes.tick_params(labelsize=SMALL * 72 / DPI, labelfontfamily=FONT)

    def font(self, size: Number) -> Any:
        """Letters of `size` pixels."""
        from matplotlib.font_manager import FontProperties

        return FontProperties(family=FONT, size=size * 72 / DPI)

    def tile(self, image: np.ndarray, left: int, top: int) -> None:
        """`image` (h, w, 3), unchanged, with a line one pixel wide around it."""
        height, width = image.shape[:2]
        self._pixels[top - 1 : top + height + 1, left - 1 : left + width + 1] = FRAME
        self._pixels[top : top + height, left : left + width] = image

    def rule(self, left: int, right: int, y: int) -> None:
        """A horizontal line."""
        self._pixels[y : y + 2, left:right] = FRAME

    def title(self, title: str, about: str, *, scale: Number = 1) -> None:
        """Two lines at the top."""
        middle, width = self.width / 2, self.width - 40
        self.text(title, middle, 44 * scale, LARGE * scale, width=width, symbols=True)
        self.text(about, middle, 92 * scale, SMALL * scale, width=width, colour=GREY)

    def text(
        self,
        text: str,
        x: Number,
        y: Number,
        size: Number,
        *,
        width: Number,
        colour: str = BLACK,
        symbols: bool = False,
    ) -> None:
        """`text` centred at (x, y): smaller when wider than `width`, and cut when far wider."""
        plain = "".join(c if self._has(c) else ascii(c)[1:-1] for c in shown(text))
        artist = self._figure.text(
            x / self.width,
            1 - y / self.height,
            _typeset(plain) if symbols else plain,
            color=colour,
            fontproperties=self.font(size),
            math_fontfamily=MATH,
            parse_math=symbols,
            ha="center",
            va="center_baseline",
        )
        taken = self._width_of(artist)
        if taken > width:
            artist.set_fontsize(artist.get_fontsize() * max(0.7, 0.95 * width / taken))
        while self._width_of(artist) > width and len(plain) > 1:
            plain = plain[: -max(1, len(plain) // 16)]
            artist.set_text((_typeset(plain) if symbols else plain) + "…")

    def save(self, path: Path | str) -> None:
        """Writes the page to `path`, whole or not at all, with no date and no version in it.

        A path that ends in .pdf gets a vector page, its tiles unchanged; any other a PNG.
        """
        path = Path(path)
        with disk_errors(path.parent, "creating"):
            path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            if path.suffix == ".pdf":
                self._write_pdf(partial)
            else:
                Image.fromarray(self.pixels()).save(partial, format="png")

    def pixels(self) -> np.ndarray:
        """The page, uint8 (height, width, 3)."""
        tiles = self._figure.figimage(self._pixels, 0, 0, origin="upper", zorder=-1)
        self._canvas.draw()
        tiles.remove()
        return np.asarray(self._canvas.buffer_rgba())[..., :3].copy()

    def _write_pdf(self, path: Path) -> None:
        from matplotlib.backends.backend_pdf import FigureCanvasPdf

        tiled = bool((self._pixels != 255).any())
        if tiled:  # figimage counts in pixels, of which a PDF has none
            page = self._figure.add_axes((0, 0, 1, 1), zorder=-1)
            page.imshow(self._pixels, aspect="auto", interpolation="none")
            page.axis("off")
        try:
            nothing = dict.fromkeys(("CreationDate", "ModDate", "Producer", "Creator"))
            with path.open("wb") as file:
                FigureCanvasPdf(self._figure).print_pdf(file, metadata=nothing)
        finally:
            if tiled:
                page.remove()
            self._figure.set_canvas(self._canvas)

    def _width_of(self, artist: Any) -> float:
        return float(artist.get_window_extent(self._canvas.get_renderer()).width)

    def _has(self, character: str) -> bool:
        """Whether the font can draw it: matplotlib would warn and draw an empty box."""
        from matplotlib.font_manager import findfont, get_font

        return bool(get_font(findfont(FONT)).get_char_index(ord(character)))


def save_film(pages: Sequence[np.ndarray], path: Path, *, milliseconds: int, last: int) -> None:
    """Writes `pages`, uint8 (h, w, 3) of one size, as an endless GIF.

    Args:
        pages: in order, at least one.
        path: of the GIF.
        milliseconds: each page is shown, in steps of 10.
        last: milliseconds of the last one.
    """
    # One palette, of a few pages: with one of its own, each page would flicker.
    some = np.concatenate(pages[:: max(1, len(pages) // 4)])
    palette = Image.fromarray(some).quantize(256, dither=Image.Dither.NONE)
    frames = [Image.fromarray(page).quantize(palette=palette, dither=Image.Dither.NONE) for page in pages]
    with disk_errors(path.parent, "creating"):
        path.parent.mkdir(parents=True, exist_ok=True)
    durations = [milliseconds] * (len(frames) - 1) + [last]
    with whole_file(path) as partial:
        frames[0].save(partial, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)


def _typeset(text: str) -> str:
    r"""`text` with u*, u_theta, p_t and tau as symbols, and every $ of its own kept a plain dollar."""
    escaped = text.replace("$", r"\$")
    return _TOKEN.sub(lambda match: _SYMBOLS[match.group()], escaped)
