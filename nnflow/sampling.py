"""From noise to images along a velocity field.

With the mean m frozen over a step, x <- x + (dt / (1 - t)) (m - x) solves dx/dt = (m - x) / (1 - t)
exactly: it is Euler's step, and the last one, dt = 1 - t, lands on m. u* itself has no value at t = 1;
its samples end on the mean, once that is one image. Once it is, it stays so (docs/field.md, section 7), and
the rest of the way is one such step.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchdiffeq import odeint
from tqdm import tqdm

from nnflow.errors import InputError
from nnflow.velocity import EmpiricalVelocity, Estimate, HybridVelocity, Velocity

# Runge-Kutta: for each stage after the first the weights of the slopes before it, then those of the step.
# rk4 is the 3/8 rule, torchdiffeq's.
_FIXED: dict[str, tuple[tuple[float, ...], ...]] = {
    "euler": ((1.0,),),
    "heun": ((1.0,), (1 / 2, 1 / 2)),
    "midpoint": ((1 / 2,), (0.0, 1.0)),
    "rk4": ((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0), (1 / 8, 3 / 8, 3 / 8, 1 / 8)),
}
METHODS = (*_FIXED, "dopri5", "dopri8", "bosh3", "adaptive_heun")

# An adaptive solver stops here and the rest is one closed step: it would ask for t = 1, 0/0 for u*.
_LAST = 1 - 1e-3
# One image holds all but this of the mass: the mean is that image to 3e-4 grey levels. Below 1/510 it only
# gains from then on (docs/field.md, section 7).
_COLLAPSED = 1e-6
_SAME_TIME = 1e-6
# Halving the last step ends here: images that still share the mass are copies of each other.
_NEAREST_END = 1e-5


def noise_of(seeds: Iterable[int], shape: Sequence[int]) -> Float[Tensor, "S C H W"]:
    """Standard normal noise, one generator per seed: a sample does not depend on its batch.

    Args:
        seeds: integers, one per sample.
        shape: (C, H, W).
    """
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def sample(
    field: Velocity,
    start: Tensor | Sequence[int],
    steps: int = 50,
    method: str = "euler",
    *,
    label: Tensor | int | None = None,
    batch: int = 64,
    rtol: float = 1e-4,
    atol: float = 1e-4,
    progress: bool = False,
) -> Float[Tensor, "S C H W"]:
    """Integrates `field` from noise at t = 0 to images at t = 1.

    Args:
        field: the velocity.
        start: noise, float32 (S, C, H, W); or a seed for each sample.
        steps: equal steps of euler, heun, midpoint and rk4. A hybrid's tau is made one of their ends.
            Adaptive methods choose their own, and take the last thousandth in closed form. Samples of an
            empirical field skip those after all but 1e-6 of the mass is on one image.
        method: euler (exact for a frozen mean), heun, or a solver of torchdiffeq. Adaptive ones choose
            their steps for each sample by itself, so they integrate one at a time.
        label: class of the samples, one or (S,).
        batch: samples integrated together.
        rtol: relative tolerance of adaptive solvers.
        atol: absolute tolerance of adaptive solvers.
        progress: show a bar on stderr.

    Returns:
        Images (S, C, H, W) on the CPU. Those of an empirical field are training images.

    Raises:
        InputError: an unknown method, fewer than 1 step or sample, noise of another shape.
    """
    if method not in METHODS:
        raise InputError(f"method {method!r}: wanted one of {', '.join(METHODS)}")
    if steps < 1 or batch < 1:
        raise InputError(f"steps = {steps}, batch = {batch}: wanted at least 1 of each")
    noise = start if isinstance(start, Tensor) else noise_of(start, field.shape)
    if len(noise) == 0 or tuple(noise.shape[1:]) != tuple(field.shape):
        raise InputError(
            f"noise of shape {tuple(noise.shape)}: wanted (S, {', '.join(map(str, field.shape))})"
        )
    labels = None
    if label is not None:
        labels = torch.as_tensor(label, device=field.device).expand(len(noise))
    solver = _Solver(method, rtol, atol)
    size = 1 if solver.adaptive else batch
    images = []
    with tqdm(total=len(noise), desc="sampling", unit="image", disable=not progress) as bar:
        for first in range(0, len(noise), size):
            x = noise[first : first + size].to(field.device)
            some = None if labels is None else labels[first : first + size]
            images.append(_integrate(field, x, some, steps, solver).cpu())
            bar.update(len(x))
    return torch.cat(images)


@dataclass(frozen=True)
class _Solver:
    method: str
    rtol: float
    atol: float

    @property
    def adaptive(self) -> bool:
        return self.method not in _FIXED


def _integrate(field: Velocity, x: Tensor, label: Tensor | None, steps: int, solver: _Solver) -> Tensor:
    times = _times(field, steps, solver.adaptive)
    if not isinstance(field, HybridVelocity):
        return _travel(field, x, label, times, solver)
    # the switch is the end of a step: one field rules each
    x = _travel(field.before, x, label, [t for t in times if t <= field.tau], solver)
    return _travel(field.after, x, label, [t for t in times if t >= field.tau], solver)


def _times(field: Velocity, steps: int, adaptive: bool) -> list[float]:
    """Ends of the steps from 0 to 1, with a hybrid's switch among them."""
    ends = [0.0, _LAST, 1.0] if adaptive else [step / steps for step in range(steps + 1)]
    if isinstance(field, HybridVelocity) and 0 < field.tau < 1:
        # in place of an end that is the same but for rounding: 3 / 10 and 0.1 + 0.2
        ends = [end for end in ends if end in (0, 1) or abs(end - field.tau) > _SAME_TIME] + [field.tau]
    return sorted(ends)


def _travel(field: Velocity, x: Tensor, label: Tensor | None, ends: list[float], solver: _Solver) -> Tensor:
    """From ends[0] to ends[-1] along one field; a sample whose mean has become one image goes at once."""
    arrived = torch.empty_like(x)
    left = torch.arange(len(x), device=x.device)
    for start, stop in pairwise(ends):
        if stop == 1:
            x = _close(field, x, start, label)
        elif solver.adaptive:
            x = _solve(field, x, label, (start, stop), solver)
        elif not isinstance(field, EmpiricalVelocity):
            x = _step(field, x, label, (start, stop), solver.method, field(x, start, label))
        else:
            estimate = field.estimate(x, start, label)
            one = is_one_image(estimate)
            arrived[left[one]] = _straight(x[one], estimate.mean[one], start, ends[-1])
            left, x, first = left[~one], x[~one], estimate.velocity[~one]
            label = None if label is None else label[~one]
            if len(left) == 0:
                break
            x = _step(field, x, label, (start, stop), solver.method, first)
    arrived[left] = x
    return arrived


def is_one_image(estimate: Estimate) -> Bool[Tensor, " B"]:
    """Whether the mean is one stored image, to which the sample then moves straight.

    The effective sample size does not say it alone: a far field can put all mass on one image that it
    knows in a few coordinates only. That mean is a blur.
    """
    return (estimate.ess <= 1 + 2 * _COLLAPSED) & (estimate.far_mass < 0.5)


def _straight(x: Tensor, mean: Tensor, t: float, stop: float) -> Tensor:
    """Where x is at `stop` if the mean stays what it is at t."""
    return x.lerp(mean, (stop - t) / (1 - t))


def _step(
    field: Velocity, x: Tensor, label: Tensor | None, span: tuple[float, float], method: str, first: Tensor
) -> Tensor:
    """One explicit Runge-Kutta step over `span`; `first` is the slope at its start."""
    start, length = span[0], span[1] - span[0]
    *stages, last = _FIXED[method]
    slopes = [first]
    for weights in stages:
        slopes.append(field(_moved(x, length, weights, slopes), start + length * sum(weights), label))
    return _moved(x, length, last, slopes)


def _moved(x: Tensor, length: float, weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    for weight, slope in zip(weights, slopes, strict=True):
        x = x + length * weight * slope
    return x


class _Collapsed(Exception):  # noqa: N818
    """No error: how a callback ends the loop of torchdiffeq."""


class _Slopes:
    """A field as torchdiffeq calls it. Ends its loop where a step would start from one image."""

    def __init__(self, field: Velocity, label: Tensor | None, stop: float) -> None:
        self.field, self.label, self.stop = field, label, stop
        self.asked: tuple[Tensor, Estimate] | None = None

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        if not isinstance(self.field, EmpiricalVelocity):
            return self.field(x, t, self.label)
        estimate = self.field.estimate(x, t, self.label)
        self.asked = x, estimate
        return estimate.velocity

    def callback_step(self, t: Tensor, x: Tensor, _length: Tensor) -> None:
        """Before every step: its first slope is the last one asked for, unless a step has been refused."""
        if self.asked is None or not torch.equal(self.asked[0], x):
            return
        if bool(is_one_image(self.asked[1]).all()):
            self.reached = _straight(x, self.asked[1].mean, float(t), self.stop)
            raise _Collapsed


def _solve(
    field: Velocity, x: Tensor, label: Tensor | None, span: tuple[float, float], solver: _Solver
) -> Tensor:
    """One of torchdiffeq's adaptive solvers over `span`."""
    slopes = _Slopes(field, label, span[1])
    ends = torch.tensor(span, device=x.device)
    # It steps past the end and interpolates back unless told to stop there, and looks for its first step
    # past the end of a short span unless given one.
    options = {"step_t": ends[1:], "first_step": (span[1] - span[0]) / 50}
    try:
        return odeint(
            slopes, x, ends, method=solver.method, rtol=solver.rtol, atol=solver.atol, options=options
        )[-1]
    except _Collapsed:
        return slopes.reached


def _close(field: Velocity, x: Tensor, t: float, label: Tensor | None) -> Tensor:
    """The step to t = 1, which lands on the mean; for u*, on the one image the mean becomes.

    A coarse last step may start before the mean is one image: then half of what is left is taken, and so
    on until it is. Near-duplicates two grey levels apart in one pixel part at 1 - t = 0.003.
    """
    if not isinstance(field, EmpiricalVelocity):
        return x + (1 - t) * field(x, t, label)
    images = torch.empty_like(x)
    left = torch.arange(len(x), device=x.device)
    while len(left):
        estimate = field.estimate(x, t, None if label is None else label[left])
        images[left] = estimate.mean
        mixed = (~is_one_image(estimate)).nonzero()[:, 0]
        if 1 - t < _NEAREST_END:
            break
        left = left[mixed]
        x = x[mixed] + (1 - t) / 2 * estimate.velocity[mixed]
        t = (1 + t) / 2
    return images
