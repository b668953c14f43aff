"""The pictures of `plane`: paths, u* and trajectories; disagreement over time; a film of p_t."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from nnflow.figures.experiment import Document, save_both
from nnflow.figures.pictures import from_text
from nnflow.sheet import BLACK, BLUE, GREY, MEDIUM, ORANGE, SMALL, Sheet, save_film

_PANEL, _GAP = 420, 26  # of a square panel, in pixels
_LEFT, _TOP = 64, 178
_DENSITY, _DISAGREEMENT = "Blues", "cividis"
_MILLISECONDS = 90  # of one picture of the film
_LEAST = 0.01  # of a weight that is drawn


def draw(document: Document, folder: Path) -> list[Path]:
    """Writes plane.png, plane-stochastic.png (each with its .pdf), and plane-film.gif."""
    written = save_both(_overview(document), folder, "plane")
    written += save_both(_stochastic(document), folder, "plane-stochastic")
    if document.results["film_times"]:
        path = folder / "plane-film.gif"
        frames = range(len(document.results["film_times"]))
        pages = [_film_page(document, number).pixels() for number in frames]
        save_film(pages, path, milliseconds=_MILLISECONDS, last=15 * _MILLISECONDS)
        written.append(path)
    return written


class _Panels:
    """A page of square panels that share one window, with a heading above each column."""

    def __init__(self, rows: int, columns: int, reach: float, *, right: int = 20) -> None:
        self.reach = reach
        width = _LEFT + columns * (_PANEL + _GAP) + right
        self.sheet = Sheet(width, _TOP + rows * (_PANEL + _GAP) + 60)
        self.rows = rows

    def place(self, row: int, column: int) -> tuple[int, int]:
        """Left and top of a panel, in pixels."""
        return _LEFT + column * (_PANEL + _GAP), _TOP + row * (_PANEL + _GAP)

    def axes(self, row: int, column: int) -> Any:
        """The axes of a panel; numbers only at the page's left and foot."""
        left, top = self.place(row, column)
        width, height = self.sheet.width, self.sheet.height
        axes = self.sheet.axes(left / width, 1 - (top + _PANEL) / height, _PANEL / width, _PANEL / height)
        self.sheet.label(axes, "", "")
        axes.grid(visible=False)
        axes.set_xlim(-self.reach, self.reach)
        axes.set_ylim(-self.reach, self.reach)
        axes.set_xticks([-2, 0, 2], ["\N{MINUS SIGN}2", "0", "2"] if row == self.rows - 1 else [])
        axes.set_yticks([-2, 0, 2], ["\N{MINUS SIGN}2", "0", "2"] if column == 0 else [])
        return axes

    def heading(self, column: int, text: str) -> None:
        """Above a column."""
        left, _ = self.place(0, column)
        self.sheet.text(text, left + _PANEL / 2, _TOP - 28, MEDIUM, width=_PANEL, symbols=True)

    def name(self, axes: Any, text: str) -> None:
        """Within a panel, at its upper left."""
        axes.text(
            0.03, 0.97, text, transform=axes.transAxes, va="top", fontproperties=self.sheet.font(SMALL),
            bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 2}, zorder=9,
        )  # fmt: skip


def _map(text: str) -> Float[np.ndarray, "G G"]:
    """A map of values in [0, 1], the first row lowest."""
    return (from_text([text])[0, 0].numpy() + 1) / 2


def _heat(axes: Any, values: np.ndarray, reach: float, colours: str) -> Any:
    extent = (-reach, reach, -reach, reach)
    return axes.imshow(
        values,
        origin="lower",
        extent=extent,
        cmap=colours,
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="bilinear",
    )


def _dots(axes: Any, points: list[list[float]], size: int = 18) -> None:
    x, y = zip(*points, strict=True)
    axes.scatter(x, y, s=size, color=ORANGE, edgecolors="white", linewidths=0.6, zorder=5)


def _overview(document: Document) -> Sheet:
    """For each set: straight paths, u* over p_t, trajectories."""
    results, settings = document.results, document.settings
    panels = _Panels(len(results["sets"]), 3, results["reach"])
    headings = (
        "straight paths from noise to points",
        f"u* and p_t at t = {settings['arrows_at']:g}",
        "trajectories of u*",
    )
    for column, heading in enumerate(headings):
        panels.heading(column, heading)
    for row, found in enumerate(results["sets"]):
        _draw_paths(panels, panels.axes(row, 0), found)
        _draw_field(panels, panels.axes(row, 1), found, settings["arrows_at"])
        _draw_trajectories(panels.axes(row, 2), found)
    about = (
        f"x0 ~ N(0, I), {settings['trajectories']} seeds, {settings['steps']} Euler steps; "
        "orange: points, in the middle t times these"
    )
    panels.sheet.title("Flow matching onto points of the plane", about)
    return panels.sheet


def _draw_paths(panels: _Panels, axes: Any, found: dict[str, Any]) -> None:
    for start, end in found["paths"]:
        axes.plot([start[0], end[0]], [start[1], end[1]], color=BLUE, linewidth=1, alpha=0.6)
    _noise(axes, [path[0] for path in found["paths"]])
    _dots(axes, found["points"])
    panels.name(axes, f"{found['name']}, n = {len(found['points'])}")


def _noise(axes: Any, starts: list[list[float]]) -> None:
    x, y = zip(*starts, strict=True)
    axes.scatter(x, y, s=14, facecolors="none", edgecolors=GREY, linewidths=1, zorder=4)


def _draw_field(panels: _Panels, axes: Any, found: dict[str, Any], t: float) -> None:
    _heat(axes, _map(found["density"]), panels.reach, _DENSITY)
    x, y, u, v = (np.array(column) for column in zip(*found["arrows"], strict=True))
    axes.quiver(x, y, u, v, color=BLACK, angles="xy", width=0.004, pivot="mid")
    _dots(axes, [[t * a, t * b] for a, b in found["points"]], 8)


def _draw_trajectories(axes: Any, found: dict[str, Any]) -> None:
    for way in found["trajectories"]:
        x, y = zip(*way, strict=True)
        axes.plot(x, y, color=BLUE, linewidth=1.2, alpha=0.7)
    _noise(axes, [way[0] for way in found["trajectories"]])
    _dots(axes, found["points"])


def _stochastic(document: Document) -> Sheet:
    """For each set and time: the map of disagreement, and what crosses at its extremes."""
    results, settings = document.results, document.settings
    panels = _Panels(len(results["sets"]), len(settings["times"]), results["reach"], right=130)
    shown = None
    for column, t in enumerate(settings["times"]):
        panels.heading(column, f"t = {t:g}")
    for row, found in enumerate(results["sets"]):
        for column, moment in enumerate(found["moments"]):
            axes = panels.axes(row, column)
            shown = _heat(axes, _map(moment["disagreement"]), panels.reach, _DISAGREEMENT)
            axes.contour(
                _map(moment["density"]), levels=[0.1], colors="white", linewidths=1.2,
                extent=(-panels.reach, panels.reach, -panels.reach, panels.reach),
            )  # fmt: skip
            for crossing in moment["crossings"]:
                _draw_crossing(axes, found["points"], crossing)
            ess = " and ".join(f"{crossing['ess']:.1f}" for crossing in moment["crossings"])
            panels.name(axes, (f"{found['name']}: " if column == 0 else "") + f"ESS {ess}")
    sheet = panels.sheet
    bar = sheet.axes(1 - 105 / sheet.width, 0.3, 20 / sheet.width, 0.4)
    sheet.colour_bar(shown, bar, "disagreement of the velocities through x (no unit)")
    about = "lines: towards each point, as wide as its weight; at the places of most and least disagreement; "
    sheet.title("Stochastic (yellow) and not (blue)", about + "white: where p_t is a tenth of its largest")
    return sheet


def _draw_crossing(axes: Any, points: list[list[float]], crossing: dict[str, Any]) -> None:
    x, y = crossing["place"]
    for (a, b), weight in zip(points, crossing["weights"], strict=True):
        if weight >= _LEAST:
            axes.plot([x, a], [y, b], color=ORANGE, linewidth=0.6 + 5 * weight, alpha=0.9)
    axes.scatter([x], [y], s=70, color="white", edgecolors=BLACK, linewidths=1.5, zorder=6)


def _film_page(document: Document, number: int) -> Sheet:
    """p_t of all sets side by side, at one time of the film."""
    results = document.results
    t, sets = results["film_times"][number], results["sets"]
    side, gap, top = 260, 10, 76
    sheet = Sheet(gap + len(sets) * (side + gap), top + side + gap)
    sheet.text(f"p_t at t = {t:.2f}", sheet.width / 2, 24, MEDIUM, width=sheet.width)
    for column, found in enumerate(sets):
        left = gap + column * (side + gap)
        axes = sheet.axes(left / sheet.width, gap / sheet.height, side / sheet.width, side / sheet.height)
        axes.set_xticks([])
        axes.set_yticks([])
        _heat(axes, _map(found["film"][number]), results["reach"], _DENSITY)
        sheet.text(found["name"], left + side / 2, top - 16, SMALL, width=side)
    return sheet
