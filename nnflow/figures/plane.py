"""`plane`: flow matching onto a few points of the plane, where everything can be seen.

    D(x, t) = sum_i w_i |v_i - u*|^2 / sum_i w_i |v_i|^2,    v_i = (x_i - x) / (1 - t),    u* = sum_i w_i v_i

D is the share of the conditional velocities passing through (x, t) on which they disagree: the target of flow
matching is stochastic where it is near 1, and not where it is 0. The weights w_i and p_t come from the code
that weighs images (`points`). t = 0 is noise, t = 1 data.

Axes:  n points   G*G places of a grid   S trajectories   T times
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nnflow.config import knob
from nnflow.figures.drawn.plane import draw
from nnflow.figures.experiment import Document, Experiment, Settings, facts
from nnflow.figures.inputs import Inputs
from nnflow.figures.parts import Parts
from nnflow.figures.pictures import to_text
from nnflow.figures.points import SETS, SHAPE, places, points_store
from nnflow.figures.walk import walk
from nnflow.nearfield import weigh
from nnflow.sampling import noise_of
from nnflow.store import ImageStore
from nnflow.velocity import EmpiricalVelocity

REACH = 2.2  # the window is [-REACH, REACH]^2: 95 % of the noise of N(0, I)
_ARROWS = 13  # a side of the grid of arrows
_FILM_END = 0.97  # last time of the film
_DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class PlaneSettings(Settings):
    """Points, times, and how fine everything is."""

    points: int = knob(64, "points of each set (three points are three)", low=1, high=4096)
    times: tuple[float, ...] = knob(
        (0.1, 0.4, 0.7, 0.9), "times at which the disagreement is mapped", low=0, high=0.9999
    )
    arrows_at: float = knob(0.5, "time at which the arrows of u* are drawn", low=0, high=0.9999)
    grid: int = knob(81, "places along each side of a map", low=3, high=1001)
    trajectories: int = knob(40, "trajectories, from the noise of seeds 0, 1, ...", low=1, high=10_000)
    steps: int = knob(60, "Euler steps of each", low=2, high=10_000)
    film: int = knob(36, "pictures in the film of p_t; 0 for none", low=0, high=1000)
    seed: int = knob(0, "of the points and of the straight paths", low=0)


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """What passes through one place at one time.

    Attributes:
        place: x.
        disagreement: D(x, t), from 0 to 1.
        ess: effective number of points.
        weights: of every point; they add up to 1.
        velocity: u*(x, t).
    """

    place: tuple[float, float]
    disagreement: float
    ess: float
    weights: tuple[float, ...]
    velocity: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Moment:
    """The whole plane at one time; maps as grey PNG of G x G, the first row lowest.

    Attributes:
        t: the time.
        density: p_t divided by its largest value on the grid.
        disagreement: D, from 0 (black) to 1.
        crossings: the place where D is largest and the one where it is least, each weighed by p_t.
    """

    t: float
    density: str
    disagreement: str
    crossings: tuple[Crossing, ...]


@dataclass(frozen=True, kw_only=True)
class PointSet:
    """Everything about one set.

    Attributes:
        name: of the set.
        points: where they are, on the grid of stored pixels.
        moments: at the times asked for.
        arrows: (x, y, u, v) of u* on a coarse grid.
        density: p_t at the time of the arrows.
        paths: (x0, x1) of straight paths from noise to a random point.
        trajectories: for each seed the places from t = 0 to t = 1.
        film: p_t from t = 0 on, as in `Moment`.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    moments: tuple[Moment, ...]
    arrows: tuple[tuple[float, ...], ...]
    density: str
    paths: tuple[tuple[tuple[float, float], ...], ...]
    trajectories: tuple[tuple[tuple[float, float], ...], ...]
    film: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Plane:
    """All sets."""

    sets: tuple[dict[str, Any], ...]  # PointSet as JSON gives it back
    film_times: tuple[float, ...]
    missing: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All of it."""
        return {"sets": list(self.sets), "film_times": list(self.film_times), "reach": REACH}


def measure(settings: PlaneSettings, inputs: Inputs, parts: Parts) -> Plane:
    """Each set is a part."""
    found = []
    times = film_times(settings.film)
    for name in SETS:
        store = points_store(name, settings.points, settings.seed)

        def one(name: str = name, store: ImageStore = store) -> dict[str, Any]:
            field = EmpiricalVelocity.exact(store, memory=inputs.memory, device=inputs.where)
            return asdict(_measured(name, field, settings, times))

        key = settings.to_json() | {"points": store.fingerprint}
        found.append(parts.get(name.replace(" ", "-"), key, one))
    return Plane(sets=tuple(found), film_times=times)


def film_times(count: int) -> tuple[float, ...]:
    """Times of the film, closer together towards the data, where p_t changes most."""
    return tuple(round(_FILM_END * math.sin(math.pi / 2 * i / max(1, count - 1)), 4) for i in range(count))


def _measured(
    name: str, field: EmpiricalVelocity, settings: PlaneSettings, times: Sequence[float]
) -> PointSet:
    grid = grid_of(settings.grid)
    arrows = grid_of(_ARROWS)
    velocity = field(as_images(arrows).to(field.device), settings.arrows_at).cpu().flatten(1)
    draw_paths = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(len(field.store), (settings.trajectories,), generator=draw_paths)
    ends = places(field.store)[ids]
    noise = noise_of(range(settings.trajectories), SHAPE)
    return PointSet(
        name=name,
        points=_pairs(places(field.store)),
        moments=tuple(_moment(field, grid, t, settings.grid) for t in settings.times),
        arrows=tuple(_rounded(row) for row in torch.cat([arrows, velocity], 1).tolist()),
        density=_map(relative_density(field, grid, settings.arrows_at), settings.grid),
        paths=tuple(_pairs(torch.stack(pair)) for pair in zip(noise.flatten(1), ends, strict=True)),
        trajectories=_trajectories(field, noise, settings.steps),
        film=tuple(_map(relative_density(field, grid, t), settings.grid) for t in times),
    )


def grid_of(side: int) -> Float[Tensor, "m 2"]:
    """Places of the window, row by row from the lowest."""
    along = torch.linspace(-REACH, REACH, side)
    y, x = torch.meshgrid(along, along, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1)


def as_images(x: Float[Tensor, "B 2"]) -> Float[Tensor, "B 1 1 2"]:
    """Places as a field takes them."""
    return x.reshape(-1, *SHAPE)


def log_density(field: EmpiricalVelocity, x: Float[Tensor, "B 2"], t: float) -> Float[Tensor, " B"]:
    """Log p_t(x), float64: p_t is the mean of N(t x_i, (1-t)^2 I) over the points."""
    there = x.to(field.device)
    times = torch.full((len(x),), t, device=field.device)
    part = field.support.part(there, times, slice(0, len(field.store)))
    return part.weighted.log_mass.cpu() - math.log(len(field.store) * 2 * math.pi * (1 - t) ** 2)


def relative_density(field: EmpiricalVelocity, x: Float[Tensor, "B 2"], t: float) -> Float[Tensor, " B"]:
    """p_t(x) divided by its largest value there."""
    density = log_density(field, x, t)
    return (density - density.max()).exp()


def weights_at(field: EmpiricalVelocity, x: Float[Tensor, "B 2"], t: float) -> Float[Tensor, "B n"]:
    """The weight of every point at each place, float64."""
    count = len(field.store)
    ids = torch.arange(count, device=field.device).expand(len(x), count).contiguous()
    times = torch.full((len(x),), t, device=field.device)
    near = weigh(field.support.rows, ids, x.to(field.device), times, budget=field.support.budget)
    return near.logits.double().softmax(1).cpu()


@dataclass(frozen=True)
class Disagreement:
    """D of `plane`, and what it is made of."""

    weights: Float[Tensor, "B n"]
    velocity: Float[Tensor, "B 2"]
    share: Float[Tensor, " B"]


def disagreement(field: EmpiricalVelocity, x: Float[Tensor, "B 2"], t: float) -> Disagreement:
    """D(x, t) at each place, float64."""
    weights = weights_at(field, x, t)
    conditional = (places(field.store).double() - x.double()[:, None]) / (1 - t)  # B n 2
    velocity = torch.einsum("bn,bnk->bk", weights, conditional)
    square = torch.einsum("bn,bn->b", weights, conditional.square().sum(-1))
    apart = torch.einsum("bn,bn->b", weights, (conditional - velocity[:, None]).square().sum(-1))
    return Disagreement(weights, velocity, apart / square.clamp_min(1e-300))


def _moment(field: EmpiricalVelocity, grid: Tensor, t: float, side: int) -> Moment:
    density = relative_density(field, grid, t)
    found = disagreement(field, grid, t)
    rows = [int((density * weight).argmax()) for weight in (found.share, 1 - found.share)]
    return Moment(
        t=t,
        density=_map(density, side),
        disagreement=_map(found.share, side),
        crossings=tuple(_crossing(found, grid, row) for row in rows),
    )


def _crossing(found: Disagreement, grid: Tensor, row: int) -> Crossing:
    weights = found.weights[row]
    place, velocity = _pairs(torch.stack([grid[row].double(), found.velocity[row]]))
    return Crossing(
        place=place,
        disagreement=round(found.share[row].item(), _DIGITS),
        ess=round(1 / weights.square().sum().item(), _DIGITS),
        weights=_rounded(weights.tolist()),
        velocity=velocity,
    )


def _trajectories(
    field: EmpiricalVelocity, noise: Tensor, steps: int
) -> tuple[tuple[tuple[float, float], ...], ...]:
    states = list(walk(field, noise, steps))
    way = [state.x.flatten(1) for state in states] + [states[-1].mean.flatten(1)]
    return tuple(_pairs(row) for row in torch.stack(way, 1))


def _map(values: Float[Tensor, " m"], side: int) -> str:
    """Values in [0, 1] as a grey PNG."""
    (text,) = to_text(values.float().mul(2).sub(1).reshape(1, 1, side, side))
    return text


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(value, _DIGITS) for value in values)


def _pairs(values: Float[Tensor, "m 2"]) -> tuple[tuple[float, float], ...]:
    return tuple((round(x, _DIGITS), round(y, _DIGITS)) for x, y in values.tolist())


def caption(document: Document) -> str:
    """What is seen, and what it was made of."""
    settings, sets = document.settings, document.results["sets"]
    counts = ", ".join(f"{found['name']} n = {len(found['points'])}" for found in sets)
    times = ", ".join(f"{t:g}" for t in settings["times"])
    return (
        f"Point sets in the plane, d = 2 ({counts}; seed {settings['seed']}). First picture: straight paths "
        f"from noise to points, u* at t = {settings['arrows_at']:g} over p_t, and {settings['trajectories']} "
        f"trajectories of {settings['steps']} Euler steps. Film: p_t. Last: where the conditional velocities "
        f"that pass through (x, t) disagree, at t = {times} (0: they agree, the target is not stochastic; 1: "
        "they cancel), with lines towards the points, as wide as their weights, at the places of most and of "
        f"least disagreement. {facts(document)}"
    )


EXPERIMENT = Experiment(
    name="plane",
    title="What stochastic and not stochastic look like",
    about="Paths, u*, weights and trajectories of point sets in the plane, and a film of p_t.",
    claim=(
        "Conditional velocities cross where several data points are likely, and u* averages them; where one "
        "point holds all the weight, the target is deterministic."
    ),
    settings=PlaneSettings,
    needs=(),
    takes=(),
    measure=measure,
    draw=draw,
    caption=caption,
    tolerant=False,
)
