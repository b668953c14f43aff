"""The pictures of `trajectories`: curves over t, and a strip of images for some seeds."""

from pathlib import Path
from typing import Any

from nnflow.figures.experiment import Document, images_in_words, save_both
from nnflow.figures.pictures import from_text
from nnflow.plots import tiles
from nnflow.sheet import BLUE, GREY, MEDIUM, ORANGE, SMALL, Sheet

_TIME = "time t (0 = noise, 1 = data)"
_COLOURS = {"u*": BLUE, "u_theta": ORANGE}
_DASHES = {"u*": "-", "u_theta": (0, (5, 2))}
_TILE = 112  # pixels an image is enlarged to, about


def draw(document: Document, folder: Path) -> list[Path]:
    """Writes trajectories.png and .pdf, and the strips where there are any."""
    written = save_both(_curves(document), folder, "trajectories")
    if any(track["strip_x"] for track in document.results["tracks"]):
        written += save_both(_strips(document), folder, "trajectories-strips")
    return written


def _about(document: Document) -> str:
    settings = document.settings
    index = document.provenance["inputs"]["index"]
    seeds = f"{settings['seeds']:,} noise seeds, {settings['steps']} Euler steps"
    return f"{images_in_words(index['shape'])}; {seeds}"


def _curves(document: Document) -> Sheet:
    results = document.results
    panels = [_draw_ess, _draw_decided, *([_draw_apart] if results["apart"] is not None else [])]
    sheet = Sheet(640 * len(panels) + 40, 860)
    width = 1 / len(panels)
    for number, panel in enumerate(panels):
        axes = sheet.axes(width * (number + 0.19), 0.125, width * 0.76, 0.61)
        panel(sheet, axes, results)
        axes.set_xlim(0, 1)
        sheet.key(axes, columns=1)
    sheet.title("Trajectories of the same noise", _about(document))
    return sheet


def _draw_ess(sheet: Sheet, axes: Any, results: dict[str, Any]) -> None:
    """Median over the seeds and the middle 80 %."""
    for track in results["tracks"]:
        columns = [sorted(column) for column in zip(*track["ess"], strict=True)]
        low, middle, high = ([_at(column, q) for column in columns] for q in (0.1, 0.5, 0.9))
        colour = _COLOURS[track["name"]]
        axes.fill_between(results["times"], low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(
            results["times"], middle, color=colour, linewidth=2.5, linestyle=_DASHES[track["name"]],
            label=_symbol(track["name"]) + ": median and middle 80 %",
        )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    sheet.label(axes, _TIME, "effective number of images (ESS)")


def _draw_decided(sheet: Sheet, axes: Any, results: dict[str, Any]) -> None:
    """Share of the seeds whose last leading image leads already, for good."""
    for track in results["tracks"]:
        when = [1.0 if t is None else t for t in track["decided"]]
        share = [100 * sum(w <= t for w in when) / len(when) for t in results["times"]]
        axes.step(
            results["times"], share, where="post", color=_COLOURS[track["name"]], linewidth=2.5,
            linestyle=_DASHES[track["name"]], label=_symbol(track["name"]),
        )  # fmt: skip
    if results["parted"] is not None:
        when = [t for t in results["parted"] if t is not None]
        share = [100 * sum(w <= t for w in when) / len(results["parted"]) for t in results["times"]]
        axes.step(
            results["times"], share, where="post", color=GREY, linewidth=2.5, linestyle=(0, (1, 1.5)),
            label="the two have parted",
        )  # fmt: skip
    axes.set_ylim(0, 102)
    sheet.label(axes, _TIME, "seeds whose leading image is the last (%)")


def _draw_apart(sheet: Sheet, axes: Any, results: dict[str, Any]) -> None:
    columns = [sorted(column) for column in zip(*results["apart"], strict=True)]
    low, middle, high = ([_at(column, q) for column in columns] for q in (0.1, 0.5, 0.9))
    axes.fill_between(results["times"], low, high, color=GREY, alpha=0.2, linewidth=0)
    axes.plot(results["times"], middle, color=GREY, linewidth=2.5, label="median and middle 80 %")
    axes.set_ylim(0, None)
    sheet.label(axes, _TIME, "RMS difference of x_t (pixels in [\N{MINUS SIGN}1, 1])")


def _at(ascending: list[float], quantile: float) -> float:
    """The value at a quantile, of the values there are."""
    return ascending[round(quantile * (len(ascending) - 1))]


def _symbol(name: str) -> str:
    return {"u*": "$u^{*}$", "u_theta": r"$u_\theta$"}[name]


def _strips(document: Document) -> Sheet:
    """For each seed two rows a field, x_t and m, over the frames; below m the image that leads."""
    results = document.results
    tracks, frames = results["tracks"], results["frames"]
    side = tiles(from_text(tracks[0]["strip_x"][0][:1]), "x", target=_TILE)[0].shape[0]
    shown = len(tracks[0]["strip_x"])
    gap, left, top, line = 8, 190, 200, 34
    row, seed_gap = side + gap, 26
    block = len(tracks) * (2 * row + line) + seed_gap
    width = max(left + len(frames) * row + 20, 900)
    sheet = Sheet(width, top + shown * block + 10)
    sheet.title("The same noise, step by step", _about(document))
    for column, t in enumerate(frames):
        middle = left + column * row + side / 2
        sheet.text(f"t = {t:g}", middle, top - 22, SMALL, width=row)
    for seed in range(shown):
        for number, track in enumerate(tracks):
            y = top + seed * block + number * (2 * row + line)
            _strip(sheet, results, track, seed, left=left, top=y, side=side, gap=gap)
    return sheet


def _strip(
    sheet: Sheet,
    results: dict[str, Any],
    track: dict[str, Any],
    seed: int,
    *,
    left: int,
    top: int,
    side: int,
    gap: int,
) -> None:
    row = side + gap
    sheet.text(f"seed {seed}", left / 2, top + 24, SMALL, width=left - 20, colour=GREY)
    for number, (what, name) in enumerate((("strip_x", "x"), ("strip_mean", "m"))):
        y = top + number * row
        label = f"{name}, {track['name']}"
        sheet.text(label, left / 2, y + side / 2 + 8, MEDIUM, width=left - 20, symbols=True)
        for column, tile in enumerate(tiles(from_text(track[what][seed]), what, target=_TILE)):
            sheet.tile(tile, left + column * row, y)
    for column, t in enumerate(results["frames"]):
        image = track["leading"][seed][results["times"].index(t)]
        text = "\N{EN DASH}" if image < 0 else f"#{image}"
        place = (left + column * row + side / 2, top + 2 * row + 8)
        sheet.text(text, *place, SMALL - 2, width=side, colour=GREY)
