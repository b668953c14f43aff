"""The pictures of `targets`: quality over steps, differences, noise and errors over t, samples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnflow.figures.drawn.tiles import strip
from nnflow.figures.experiment import Document, images_in_words, save_both
from nnflow.sheet import BLACK, BLUE, GREY, MEDIUM, ORANGE, SMALL, Number, Sheet

_TIME = "time t (0 = noise, 1 = data)"
# Okabe & Ito's, each with a mark of its own for grey print.
_STYLES = (
    (BLACK, "o"),
    (ORANGE, "s"),
    ("#56B4E9", "^"),
    (BLUE, "D"),
    ("#009E73", "v"),
    ("#CC79A7", "P"),
    ("#E69F00", "X"),
    (GREY, "*"),
)
_REFERENCES = (("training", BLUE, "o"), ("held-out", ORANGE, "s"))
_DASHED = (0, (4, 3))
_SMALLEST = 1e-3  # of the largest value: the end of a logarithmic axis, u* has no variance at all
_PLACES = ((0.075, 0.55), (0.58, 0.55), (0.075, 0.075), (0.58, 0.075))
_SIZE = (0.395, 0.25)
_HEIGHT = 1640  # of a page of four panels


def draw(document: Document, folder: Path) -> list[Path]:
    """Writes targets, targets-differences, targets-noise and targets-samples, each as PNG and PDF."""
    made = [_quality(document), _differences(document), _noise(document), _samples(document)]
    names = ("targets", "targets-differences", "targets-noise", "targets-samples")
    return [
        path
        for name, sheet in zip(names, made, strict=True)
        if sheet is not None
        for path in save_both(sheet, folder, name)
    ]


def _about(document: Document) -> str:
    shape = document.provenance["inputs"]["index"]["shape"]
    seeds = ", ".join(map(str, document.settings["seeds"]))
    return f"{images_in_words(shape)}, {document.results['step']:,} steps, seeds {seeds}"


def _styles(document: Document) -> list[tuple[dict[str, Any], str, str]]:
    """Each target with its colour and its mark."""
    return [
        (target, *_STYLES[number % len(_STYLES)]) for number, target in enumerate(document.results["targets"])
    ]


def _band(
    axes: Any, x: Sequence[Number], rows: Sequence[Sequence[Number]], colour: str, mark: str, *, label: str
) -> None:
    """The mean over the seeds, and their range."""
    means = [sum(row) / len(row) for row in rows]
    axes.fill_between(
        x, [min(row) for row in rows], [max(row) for row in rows], color=colour, alpha=0.15, linewidth=0
    )
    axes.plot(x, means, color=colour, marker=mark, markersize=9, linewidth=2.5, label=label)


def _quality(document: Document) -> Sheet:
    """Frechet distance over the steps of the training, for each extractor and reference."""
    frechet = document.results["targets"][0]["frechet"]
    panels = [(called, reference) for called in frechet for reference in frechet[called]]
    sheet = Sheet(1900, _HEIGHT if len(panels) > 2 else 900)
    for (called, reference), (left, bottom) in zip(panels, _PLACES, strict=False):
        small = len(panels) <= 2
        size = (_SIZE[0], 0.46) if small else _SIZE
        axes = sheet.axes(left, 0.14 if small else bottom, *size)
        for target, colour, mark in _styles(document):
            rows = target["frechet"][called][reference]
            _band(axes, target["steps"], rows, colour, mark, label=target["name"])
        values = [v for t, *_ in _styles(document) for row in t["frechet"][called][reference] for v in row]
        null = document.results["null"].get(called)
        if null is not None and reference == "training":
            axes.axhline(null["value"], color=GREY, linewidth=2, linestyle=_DASHED, label="held-out images")
            values.append(null["value"])
        axes.set_xlim(0, None)
        sheet.label(axes, "training steps", f"Frechet distance, {called}")
        sheet.scale(axes, values, least=3)
        axes.set_title(f"samples to {reference} images", fontproperties=sheet.font(MEDIUM), y=1.22)
        sheet.key(axes, columns=4)
    sheet.title("Sample quality of networks that differ in their target alone", _about(document))
    note = f"mean and range of the seeds; {document.settings['samples']:,} samples of the same noise each"
    sheet.text(note, sheet.width / 2, 132, SMALL, width=sheet.width - 40, colour=GREY)
    return sheet


def _differences(document: Document) -> Sheet | None:
    """Every target against the first, with the interval of the paired differences."""
    results = document.results
    first, others = results["targets"][0]["name"], results["targets"][1:]
    called = sorted({one["extractor"] for target in others for one in target["differences"]}, reverse=True)
    if not called:
        return None
    sheet = Sheet(1900, 860)
    for name, left in zip(called, (0.13, 0.6), strict=False):
        axes = sheet.axes(left, 0.14, 0.37, 0.56)
        for shift, (reference, colour, mark) in enumerate(
            (("training", BLUE, "o"), ("held-out", ORANGE, "s"))
        ):
            found = [
                (row + 0.16 * (2 * shift - 1), one)
                for row, target in enumerate(others)
                for one in target["differences"]
                if (one["extractor"], one["reference"]) == (name, reference)
            ]
            _bars(axes, found, colour, mark, f"to {reference} images")
        axes.axvline(0, color=GREY, linewidth=2, linestyle=_DASHED)
        axes.set_yticks(range(len(others)), [target["name"] for target in others])
        axes.set_ylim(len(others) - 0.5, -0.5)
        sheet.label(axes, f"Frechet distance less that of {first} ({name})", "")
        sheet.key(axes, columns=2)
    sheet.title(f"Differences to {first} at the last step, paired by seed", _about(document))
    note = f"Student's 95 % intervals; dots: each seed; left of 0 is better than {first}"
    sheet.text(note, sheet.width / 2, 132, SMALL, width=sheet.width - 40, colour=GREY)
    return sheet


def _bars(axes: Any, found: list[tuple[float, dict[str, Any]]], colour: str, mark: str, name: str) -> None:
    if not found:
        return
    rows = [row for row, _ in found]
    means = [one["mean"] for _, one in found]
    reach = [
        [one["mean"] - one["low"] for _, one in found],
        [one["high"] - one["mean"] for _, one in found],
    ]
    style = {"color": colour, "capsize": 6, "linewidth": 2.5, "linestyle": "none", "label": name}
    axes.errorbar(means, rows, xerr=reach, marker=mark, markersize=10, **style)
    for row, one in found:
        values = one["values"]
        axes.plot(values, [row] * len(values), color=colour, marker=".", linestyle="none", alpha=0.6)


def _noise(document: Document) -> Sheet:
    """Loss, variances, and the errors of the trained networks, over t."""
    sheet = Sheet(1900, _HEIGHT)
    panels = (
        ("target", "variance of the target, per value"),
        ("gradient", "variance of the gradient"),
        ("loss", "|u_theta \N{MINUS SIGN} target|\N{SUPERSCRIPT TWO} per value"),
        ("error", "|u_theta \N{MINUS SIGN} u*|\N{SUPERSCRIPT TWO} per value"),
    )
    titles = (
        "at one x_t, over what is drawn",
        "of a batch: all, and the target's share dashed",
        "loss of each target, at the same weights",
        "error of each network, on training paths",
    )
    for (what, name), title, (left, bottom) in zip(panels, titles, _PLACES, strict=True):
        axes = sheet.axes(left, bottom, *_SIZE)
        values = _draw_noise(axes, document, what)
        sheet.label(axes, _TIME, name)
        if what == "target":
            axes.set_ylim(0, None)
        else:
            floor = _SMALLEST * max(values)
            sheet.scale(axes, [max(value, floor) for value in values])
            axes.set_ylim(floor if min(values) < floor else None, None)
        axes.set_xlim(0, 1)
        axes.set_title(title, fontproperties=sheet.font(MEDIUM), y=1.22)
        sheet.key(axes, columns=4)
    first = document.results["targets"][0]["name"]
    sheet.title(f"How noisy the targets are, at the weights of the networks of {first}", _about(document))
    note = "mean and range of the seeds"
    sheet.text(note, sheet.width / 2, 132, SMALL, width=sheet.width - 40, colour=GREY)
    return sheet


def _draw_noise(axes: Any, document: Document, what: str) -> list[float]:
    """Curves of one panel; the values drawn."""
    drawn: list[float] = []
    for target, colour, mark in _styles(document):
        where = target["error"] if what == "error" else target["noise"]
        rows = where["mean_squared"] if what == "error" else where[what]
        if rows is None:
            continue
        drawn += [value for row in rows for value in row]
        _band(axes, where["times"], rows, colour, mark, label=target["name"])
        share = where.get("gradient_target") if what == "gradient" else None
        if share is not None:
            means = [sum(row) / len(row) for row in share]
            axes.plot(where["times"], means, color=colour, linewidth=2, linestyle=_DASHED)
            drawn += means
    return drawn


def _samples(document: Document) -> Sheet:
    rows = [(target["name"], target["samples"]) for target in document.results["targets"]]
    count = len(rows[0][1])
    return strip(
        rows,
        title="Samples of the same noise",
        about=f"noise seeds 0 to {count - 1}, {document.results['step']:,} steps, training seed "
        f"{document.settings['seeds'][0]}",
    )
