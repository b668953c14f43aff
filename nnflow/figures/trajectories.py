"""`trajectories`: what u* and u_theta make of the same noise, step by step, and where they part.

Of every trajectory: x_t, the posterior mean m(x_t, t), the effective number of images at x_t (ESS), and which
image leads there, that is weighs most in u*. With --run the same along u_theta.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nnflow.config import knob
from nnflow.figures.alignment import first_lasting
from nnflow.figures.drawn.trajectories import draw
from nnflow.figures.experiment import Document, Experiment, Settings, facts
from nnflow.figures.inputs import Inputs
from nnflow.figures.parts import Parts
from nnflow.figures.pictures import to_text
from nnflow.figures.walk import State, leading, walk, walk_learned
from nnflow.sampling import noise_of

_TOGETHER = 8  # seeds of one part
_FIELDS = {"empirical": "u*", "learned": "u_theta"}


@dataclass(frozen=True, kw_only=True)
class TrajectorySettings(Settings):
    """Seeds, steps, and what is shown of them."""

    seeds: int = knob(32, "trajectories, from the noise of seeds 0, 1, ...", low=1, high=100_000)
    steps: int = knob(100, "Euler steps from t = 0 to 1", low=2, high=10_000)
    strips: int = knob(3, "seeds whose images are shown", low=0, high=64)
    frames: tuple[float, ...] = knob(
        (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75), "times at which they are shown", low=0, high=0.9999
    )


@dataclass(frozen=True, kw_only=True)
class Track:
    """Along one field; lists by seed, then by time.

    Attributes:
        name: u* or u_theta.
        ess: effective number of images.
        leading: row of the image that weighs most (n + row for a mirror image), -1 at t = 0.
        strip_x: PNG of x_t at each frame, of the seeds shown.
        strip_mean: of m(x_t, t).
    """

    name: str
    ess: tuple[tuple[float, ...], ...]
    leading: tuple[tuple[int, ...], ...]
    strip_x: tuple[tuple[str, ...], ...]
    strip_mean: tuple[tuple[str, ...], ...]

    def decided(self, times: Sequence[float]) -> tuple[float | None, ...]:
        """For each seed the time from which on its last leading image leads."""
        return tuple(first_lasting([one == row[-1] for one in row], times) for row in self.leading)


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """Both tracks, and how far they are apart.

    Attributes:
        times: at the start of each step.
        frames: the times shown.
        tracks: of u*, and of u_theta where there is a run.
        apart: root mean square over the pixels of x_t's difference, by seed and time; None without a run.
        parted: for each seed the time from which on different images lead; None where they never part.
        flip: whether mirror images count, as the network was trained with.
    """

    times: tuple[float, ...]
    frames: tuple[float, ...]
    tracks: tuple[Track, ...]
    apart: tuple[tuple[float, ...], ...] | None
    parted: tuple[float | None, ...] | None
    flip: bool
    missing: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All of it, and from when on each outcome is decided."""
        plain = asdict(self)
        plain.pop("missing")
        for track, mine in zip(plain["tracks"], self.tracks, strict=True):
            track["decided"] = mine.decided(self.times)
        return plain


def measure(settings: TrajectorySettings, inputs: Inputs, parts: Parts) -> Trajectories:
    """Some seeds at a time, each of which is a part."""
    times = tuple(step / settings.steps for step in range(settings.steps))
    frames = _frames(settings)
    key = inputs.field_key | {"steps": settings.steps, "frames": list(frames)}
    if inputs.run is not None:
        inputs.learned  # noqa: B018  a run that does not fit is told before any work
        key["run"] = inputs.run_fingerprint
    found = []
    with tqdm(total=settings.seeds, desc="trajectories", unit="seed", disable=not inputs.progress) as bar:
        for start in range(0, settings.seeds, _TOGETHER):
            seeds = range(start, min(start + _TOGETHER, settings.seeds))
            shown = len([seed for seed in seeds if seed < settings.strips])
            some = key | {"seeds": [seeds.start, seeds.stop], "strips": shown}
            job = _Job(settings, inputs, seeds, frames, shown)
            found.append(parts.get(f"seeds-{start:05d}", some, job.measure))
            bar.update(len(seeds))
    return _joined(found, times, frames, flip=inputs.flip)


def _frames(settings: TrajectorySettings) -> tuple[float, ...]:
    """The starts of steps nearest to the times asked for."""
    steps = {min(settings.steps - 1, round(t * settings.steps)) for t in settings.frames}
    return tuple(step / settings.steps for step in sorted(steps))


@dataclass(frozen=True)
class _Job:
    """One part: some seeds along each field."""

    settings: TrajectorySettings
    inputs: Inputs
    seeds: range
    frames: tuple[float, ...]
    shown: int

    def measure(self) -> dict[str, Any]:
        """Tracks by field, and how far they are apart."""
        inputs, steps = self.inputs, self.settings.steps
        flip = inputs.flip
        field = inputs.field(flip=flip)
        noise = noise_of(self.seeds, field.shape)
        label = self._label()
        walks = [("empirical", walk(field, noise, steps, label))]
        if inputs.run is not None:  # off the path of u*, where no tolerance holds
            exact = inputs.field(flip=flip, exact=True)
            walks.append(("learned", walk_learned(inputs.learned, exact, noise, steps, label)))
        records = {name: _Record(self, label, flip) for name, _ in walks}
        apart: list[Tensor] = []
        for states in zip(*(states for _, states in walks), strict=True):
            for record, state in zip(records.values(), states, strict=True):
                record.add(state)
            if len(states) == 2:
                apart.append((states[0].x - states[1].x).square().flatten(1).mean(1).sqrt())
        found: dict[str, Any] = {name: record.to_dict() for name, record in records.items()}
        return found | ({"apart": _by_seed(apart, 5)} if apart else {})

    def _label(self) -> Tensor | None:
        """Classes in turn, for a network that asks for one."""
        if self.inputs.run is None or not self.inputs.learned.classes:
            return None
        return torch.tensor([seed % self.inputs.learned.classes for seed in self.seeds])


class _Record:
    """Gathers a walk."""

    def __init__(self, job: _Job, label: Tensor | None, flip: bool) -> None:
        self.job, self.label, self.flip = job, label, flip
        self.ess: list[Tensor] = []
        self.leading: list[Tensor] = []
        self.strips: dict[str, list[list[str]]] = {"x": [], "mean": []}

    def add(self, state: State) -> None:
        """Notes one step."""
        inputs = self.job.inputs
        self.ess.append(state.ess)
        before = self.leading[-1] if self.leading else None
        found = leading(inputs.store, state, before, self.label, flip=self.flip, memory=inputs.memory)
        self.leading.append(found)
        if state.t in self.job.frames and self.job.shown:
            self.strips["x"].append(to_text(state.x[: self.job.shown]))
            self.strips["mean"].append(to_text(state.mean[: self.job.shown]))

    def to_dict(self) -> dict[str, Any]:
        """By seed, then by time."""
        strips = {f"strip_{name}": list(zip(*rows, strict=True)) for name, rows in self.strips.items()}
        leading = torch.stack(self.leading, 1).tolist()
        return {"ess": _by_seed(self.ess, 6), "leading": leading, **strips}


def _by_seed(values: Iterable[Tensor], digits: int) -> list[list[float]]:
    rows = torch.stack(list(values), 1).double().tolist()
    return [[float(f"{value:.{digits}g}") for value in row] for row in rows]


def _joined(
    found: list[dict[str, Any]], times: tuple[float, ...], frames: tuple[float, ...], *, flip: bool
) -> Trajectories:
    def all_of(field: str, what: str) -> tuple[tuple[Any, ...], ...]:
        return tuple(tuple(row) for part in found for row in part[field][what])

    tracks = tuple(
        Track(
            name=name,
            ess=all_of(field, "ess"),
            leading=all_of(field, "leading"),
            strip_x=all_of(field, "strip_x"),
            strip_mean=all_of(field, "strip_mean"),
        )
        for field, name in _FIELDS.items()
        if field in found[0]
    )
    apart = parted = None
    if len(tracks) == 2:
        apart = tuple(tuple(row) for part in found for row in part["apart"])
        parted = tuple(
            first_lasting([a != b for a, b in zip(mine, theirs, strict=True)], times)
            for mine, theirs in zip(tracks[0].leading, tracks[1].leading, strict=True)
        )
    return Trajectories(times=times, frames=frames, tracks=tracks, apart=apart, parted=parted, flip=flip)


def caption(document: Document) -> str:
    """What is seen, when it is decided, where the fields part, and what it was made of."""
    results, settings = document.results, document.settings
    told = [
        f"{settings['seeds']:,} trajectories (noise seeds 0 to {settings['seeds'] - 1}), {settings['steps']} "
        "Euler steps. ESS: effective number of images in u* at x_t, 1 / sum w^2; leading: the image that "
        "weighs most."
    ]
    for track in results["tracks"]:
        known = sorted(t for t in track["decided"] if t is not None)
        if known:
            told.append(
                f"{track['name']}: for half of the seeds the image that leads at the end leads from t = "
                f"{known[len(known) // 2]:.2f} on, for all from t = {known[-1]:.2f}."
            )
    if results["parted"] is not None:
        parted = sorted(t for t in results["parted"] if t is not None)
        told.append(f"Different images lead in the end for {len(parted)} of {len(results['parted'])} seeds")
        told[-1] += f", for half of these from t = {parted[len(parted) // 2]:.2f} on." if parted else "."
    told.append("Images are clamped to [-1, 1] for the eye.")
    return " ".join([*told, facts(document)])


EXPERIMENT = Experiment(
    name="trajectories",
    title="One noise, two fields: where the trajectories part",
    about="x_t, m(x_t, t), ESS and the leading image along the ODE, of u* and with --run of u_theta.",
    claim=(
        "u* leads every noise to a training image; which one is decided early, where networks fail to follow "
        "it (t about 0.15) and where generalisation begins."
    ),
    settings=TrajectorySettings,
    needs=("index",),
    takes=("run",),
    measure=measure,
    draw=draw,
    caption=caption,
)
