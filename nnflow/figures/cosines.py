"""`cosines`: the histogram of cos(u*(x_t, t), x1 - x0) over time, for a set in the plane and for images.

The paper's first figure. A cosine of 1 says that the regression target has no noise left: u* is the
conditional velocity. In the plane that is so only late, for images from early on.
"""

from dataclasses import dataclass
from typing import Any

from nnflow.config import knob
from nnflow.figures import alignment
from nnflow.figures.alignment import Alignment, measure_paths, summary, times_of
from nnflow.figures.drawn.cosines import draw
from nnflow.figures.experiment import Document, Experiment, Settings, facts
from nnflow.figures.inputs import Inputs
from nnflow.figures.parts import Parts
from nnflow.figures.points import SETS, points_store
from nnflow.velocity import EmpiricalVelocity


@dataclass(frozen=True, kw_only=True)
class CosineSettings(Settings):
    """Pairs, times and the set in the plane."""

    pairs: int = knob(256, "pairs of noise and image", low=1)
    times: int = knob(100, "times 0, 1/times, ... below 1", low=2, high=10_000)
    seed: int = knob(0, "of the pairs", low=0)
    points: str = knob("two moons", "the set in the plane", choices=tuple(SETS))
    point_count: int = knob(1_000, "points of it", low=1)


@dataclass(frozen=True, kw_only=True)
class Cosines:
    """Of the set in the plane, and of the images."""

    plane: Alignment
    images: Alignment
    missing: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Both, with the times at which they are aligned."""
        return {"plane": self.plane.to_dict(), "images": self.images.to_dict()}


def measure(settings: CosineSettings, inputs: Inputs, parts: Parts) -> Cosines:
    """Cosines of both sets, from the same numbers of pairs and times."""
    times = times_of(settings.times)
    field = inputs.field()
    points = points_store(settings.points, settings.point_count, settings.seed)
    exact = EmpiricalVelocity.exact(points, memory=inputs.memory, device=inputs.where)
    sets = {
        "plane": (exact, {"images": points.fingerprint, "field": "exact"}, settings.points),
        "images": (field, inputs.field_key, "images"),
    }
    found = {}
    for name, (velocity, key, called) in sets.items():
        paths = measure_paths(
            velocity,
            times=times,
            pairs=settings.pairs,
            seed=settings.seed,
            parts=parts,
            key=key,
            name=name,
            progress=inputs.progress,
        )
        found[name] = summary(paths, times, name=called, shape=velocity.store.shape)
    return Cosines(plane=found["plane"], images=found["images"])


def caption(document: Document) -> str:
    """What is seen, when the pairs are aligned, and what it was made of."""
    results, settings = document.results, document.settings
    told = [
        f"cos(u*(x_t, t), x1 - x0) of {settings['pairs']:,} pairs (seed {settings['seed']}) at "
        f"{settings['times']} times: darker where more pairs are, the line is the median."
    ]
    for part, where in (("plane", "in the plane"), ("images", "of the images")):
        found = results[part]
        when = aligned_in_words(found["aligned_from"])
        told.append(
            f"{found['name'].capitalize()} {where}, n = {found['shape'][0]:,}: {when}."
            if part == "plane"
            else f"The images: {when}."
        )
    return " ".join([*told, facts(document)])


def aligned_in_words(when: float | None) -> str:
    """From when on the pairs are aligned."""
    share, least = 100 * alignment.ALIGNED, alignment.ALIGNED
    if when is None:
        return f"at no time measured do {share:.0f} % of the cosines exceed {least:g} for good"
    return f"from t = {when:.2f} on {share:.0f} % of the cosines or more exceed {least:g}"


EXPERIMENT = Experiment(
    name="cosines",
    title="Is the target of flow matching stochastic?",
    about="Histogram over t of the cosine of u* and x1 - x0: for images the target is soon deterministic.",
    claim=(
        "In the plane u* and the conditional velocity x1 - x0 disagree for most of the time; on CIFAR-10 "
        "they are aligned before t = 0.2 (256 pairs)."
    ),
    settings=CosineSettings,
    needs=("index",),
    takes=(),
    measure=measure,
    draw=draw,
    caption=caption,
    version=2,
)
