"""The picture of `tau`: samples of a few seeds at every tau, and below what became of all of them."""

from pathlib import Path
from typing import Any

from nnflow.figures.drawn.tiles import strip
from nnflow.figures.experiment import Document, images_in_words, save_both
from nnflow.sheet import BLUE, GREY, ORANGE, SMALL, Sheet

_AXES = 620  # pixels below the samples
_WIDTH = 1900
_TIME = "tau: u* before, u_theta after (0 = noise, 1 = data)"
_GREEN = "#009E73"
_DASHED = (0, (4, 3))


def draw(document: Document, folder: Path) -> list[Path]:
    """Writes tau.png and tau.pdf."""
    results, settings = document.results, document.settings
    switches = results["switches"]
    seeds = len(switches[0]["pictures"])
    rows = [(f"noise seed {row}", [at["pictures"][row] for at in switches]) for row in range(seeds)]
    inputs = document.provenance["inputs"]
    run = inputs["run"]
    steps = f", {run['step']:,} steps of training" if "step" in run else ""
    sheet = strip(
        rows,
        title="u* until tau, u_theta from then on",
        about=f"{images_in_words(inputs['index']['shape'])}{steps}; curves: {settings['samples']} seeds",
        heads=[f"tau = {at['tau']:g}" for at in switches],
        below=_AXES,
        width=_WIDTH,
    )
    note = "tau = 0: the network alone; tau = 1: u* alone, a training image"
    sheet.text(note, sheet.width / 2, 128, SMALL, width=sheet.width - 40, colour=GREY)
    bottom, height = 100 / sheet.height, 400 / sheet.height
    left, right = (sheet.axes(at, bottom, 0.37, height) for at in (0.085, 0.595))
    _draw_shares(sheet, left, results)
    _draw_distances(sheet, right, results)
    return save_both(sheet, folder, "tau")


def _draw_shares(sheet: Sheet, axes: Any, results: dict[str, Any]) -> None:
    switches = results["switches"]
    curves = (
        ("nearer to the network's own sample", [at["own"] for at in switches], BLUE, "o"),
        ("nearest training image is u*'s", [at["same"] for at in switches], _GREEN, "^"),
        ("memorised", [at["near"]["memorised"] for at in switches], ORANGE, "s"),
    )
    taus = [at["tau"] for at in switches]
    for name, found, colour, mark in curves:
        low, high, share = ([100 * f[end] for f in found] for end in ("low", "high", "fraction"))
        axes.fill_between(taus, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(taus, share, color=colour, marker=mark, markersize=9, linewidth=2.5, label=name)
    if results["null"] is not None:
        null = 100 * results["null"]["near"]["memorised"]["fraction"]
        axes.axhline(null, color=GREY, linewidth=2, linestyle=_DASHED, label="memorised, held-out images")
    axes.set_ylim(-3, 103)
    axes.set_xlim(0, 1)
    sheet.label(axes, _TIME, "share of samples (%)")
    sheet.key(axes, columns=2)


def _draw_distances(sheet: Sheet, axes: Any, results: dict[str, Any]) -> None:
    switches = results["switches"]
    taus = [at["tau"] for at in switches]
    curves = (
        ("to the network's own sample", [at["from_own"] for at in switches], BLUE, "o"),
        ("to u*'s sample", [at["from_memorised"] for at in switches], _GREEN, "^"),
        ("to the nearest training image", [at["near"]["quantiles"]["p50"] for at in switches], ORANGE, "s"),
    )
    for name, values, colour, mark in curves:
        axes.plot(taus, values, color=colour, marker=mark, markersize=9, linewidth=2.5, label=name)
    if results["null"] is not None:
        null = results["null"]["near"]["quantiles"]["p50"]
        axes.axhline(null, color=GREY, linewidth=2, linestyle=_DASHED, label="held-out to nearest")
    axes.set_ylim(0, None)
    axes.set_xlim(0, 1)
    sheet.label(axes, _TIME, "L2, pixels in [\N{MINUS SIGN}1, 1], median")
    sheet.key(axes, columns=2)
