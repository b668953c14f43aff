"""`dimension`: the share of pairs whose target is deterministic, over t, for one image set at several sizes.

Resizing changes the dimension and nothing else. The more pixels, the earlier and the more suddenly u* becomes
x1 - x0. The time is predicted from the spectrum of each size alone (`embedding.collapse_time`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nnflow.config import knob
from nnflow.embedding import collapse_time
from nnflow.errors import InputError
from nnflow.figures.alignment import ALIGNED, Alignment, measure_paths, summary, times_of
from nnflow.figures.drawn.dimension import draw
from nnflow.figures.experiment import Document, Experiment, Settings, facts
from nnflow.figures.inputs import Inputs
from nnflow.figures.parts import Parts
from nnflow.figures.sizes import STEPS, Originals, originals_of_source, originals_of_store
from nnflow.figures.spectra import spectrum_of
from nnflow.velocity import EmpiricalVelocity


@dataclass(frozen=True, kw_only=True)
class DimensionSettings(Settings):
    """Sizes, pairs and times."""

    sizes: tuple[int, ...] = knob(
        (), "sides in pixels, e.g. 8,16,32; by default 8, 16, ... 256 as far as the images allow", low=1
    )
    pairs: int = knob(256, "pairs of noise and image, at each size", low=1)
    times: int = knob(100, "times 0, 1/times, ... below 1", low=2, high=10_000)
    seed: int = knob(0, "of the pairs, and of the images taken", low=0)
    limit: int = knob(0, "images taken of --source; 0 for all", low=0)


@dataclass(frozen=True, kw_only=True)
class Size:
    """One size.

    Attributes:
        size: height and width in pixels.
        alignment: what was measured along the paths.
        predicted: time at which half of the mass is expected on one image, from the spectrum alone.
        variance: of an image in all, squared pixels of [-1, 1].
    """

    size: int
    alignment: Alignment
    predicted: float
    variance: float


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """All sizes that the images allow."""

    sizes: tuple[Size, ...]
    resampling: str
    count: int
    missing: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything but what is missing."""
        sizes = [
            {
                "size": found.size,
                "predicted": found.predicted,
                "variance": found.variance,
                **found.alignment.to_dict(),
            }
            for found in self.sizes
        ]
        return {"sizes": sizes, "resampling": self.resampling, "count": self.count}


def measure(settings: DimensionSettings, inputs: Inputs, parts: Parts) -> Dimension:
    """Every size asked for that is not larger than the images, from small to large."""
    originals = _originals(settings, inputs, parts)
    asked = sorted(set(settings.sizes)) or [size for size in STEPS if size <= originals.smallest]
    missing = tuple(line for line in map(originals.too_large, asked) if line is not None)
    fitting = [size for size in asked if originals.too_large(size) is None]
    if not fitting:
        raise InputError(missing[0] if missing else _too_small(originals))
    found = [_measured(size, originals, settings, inputs, parts) for size in fitting]
    return Dimension(
        sizes=tuple(found), resampling=originals.resampling, count=originals.count, missing=missing
    )


def _originals(settings: DimensionSettings, inputs: Inputs, parts: Parts) -> Originals:
    if inputs.source is not None:
        return originals_of_source(inputs.source, parts, limit=settings.limit or None, seed=settings.seed)
    if inputs.index is None:
        raise InputError("neither --source nor --index was named: wanted images to resize")
    if settings.limit:
        raise InputError("--limit is of --source; the images of --index are taken all")
    return originals_of_store(inputs.store)


def _too_small(originals: Originals) -> str:
    return f"images of {originals.smallest} pixels on the shorter side: wanted 8 at least, or name --sizes"


def _measured(
    size: int, originals: Originals, settings: DimensionSettings, inputs: Inputs, parts: Parts
) -> Size:
    store = originals.at(size, parts, progress=inputs.progress)
    field = EmpiricalVelocity.exact(store, memory=inputs.memory, device=inputs.where)
    times, key = times_of(settings.times), {"images": store.fingerprint}
    paths = measure_paths(
        field,
        times=times,
        pairs=settings.pairs,
        seed=settings.seed,
        parts=parts,
        key=key,
        name=f"size-{size}",
        progress=inputs.progress,
    )

    def predicted() -> dict[str, float]:
        spectrum = spectrum_of(store, budget=inputs.memory, seed=settings.seed)
        return {"time": collapse_time(spectrum, len(store)), "variance": spectrum.sum().item()}

    spectral = parts.get(f"spectrum-{size}", key | {"seed": settings.seed}, predicted)
    return Size(
        size=size,
        alignment=summary(paths, times, name=f"{size} pixels", shape=store.shape),
        predicted=spectral["time"],
        variance=spectral["variance"],
    )


def caption(document: Document) -> str:
    """What is seen, the times of each size, and what it was made of."""
    results, settings = document.results, document.settings
    told = [
        f"Share of {settings['pairs']:,} pairs (seed {settings['seed']}) whose cosine of u* and x1 - x0 "
        f"exceeds {ALIGNED:g}, at {settings['times']} times, for n = {results['count']:,} images resized by "
        f"{results['resampling']}; bands are 95 % Wilson intervals, dashed lines the collapse predicted from "
        "each spectrum."
    ]
    told += [_in_words(found) for found in results["sizes"]]
    return " ".join([*told, facts(document)])


def _in_words(found: dict[str, Any]) -> str:
    dim = _values(found["shape"])
    return (
        f"{found['size']} pixels (d = {dim:,}): 90 % aligned {_from(found['aligned_from'])}, half of the "
        f"pairs collapsed {_from(found['collapsed_from'])}, predicted t = {found['predicted']:.3f}, "
        f"rise from 70 to 95 % {_rise(found['rise'])}."
    )


def _values(shape: Sequence[int]) -> int:
    return shape[1] * shape[2] * shape[3]


def _rise(time: float | None) -> str:
    return "not seen" if time is None else f"within {time:.3f}"


def _from(when: float | None) -> str:
    return "at no time measured" if when is None else f"from t = {when:.2f} on"


EXPERIMENT = Experiment(
    name="dimension",
    title="The higher the dimension, the earlier the target is deterministic",
    about="Share of cosines above 0.9 against t for the images at several sizes, and the predicted collapse.",
    claim=(
        "On Imagenette at 8, 16, ... 256 pixels the share of cosines above 0.9 rises earlier and more "
        "steeply the higher the dimension."
    ),
    settings=DimensionSettings,
    needs=(),
    takes=("index", "source"),
    measure=measure,
    draw=draw,
    caption=caption,
    tolerant=False,
)
