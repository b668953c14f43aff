"""From noise to images along a velocity field.

With the mean m frozen over a step, x <- x + (dt / (1 - t)) (m - x) solves dx/dt = (m - x) / (1 - t)
exactly: it is Euler's step, and the last one, dt = 1 - t, lands on m. u* itself has no value at t = 1;
its samples end on the mean, once that is one image.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor
from torchdiffeq import odeint
from tqdm import tqdm

from nnflow.errors import InputError
from nnflow.velocity import EmpiricalVelocity, HybridVelocity, Velocity

METHODS = ("euler", "heun", "midpoint", "rk4", "dopri5", "dopri8", "bosh3", "adaptive_heun")
_FIXED = ("midpoint", "rk4")

# An adaptive solver stops here and the rest is one closed step: it would ask for t = 1, 0/0 for u*.
_LAST = 1 - 1e-3
# One image holds all but this of the mass: its sample is that image to a hundredth of a grey level.
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
            Adaptive methods choose their own, and take the last thousandth in closed form.
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
    adaptive = method not in ("euler", "heun", *_FIXED)
    size = 1 if adaptive else batch
    images = []
    with tqdm(total=len(noise), desc="sampling", unit="image", disable=not progress) as bar:
        for first in range(0, len(noise), size):
            x = noise[first : first + size].to(field.device)
            some = None if labels is None else labels[first : first + size]
            images.append(_integrate(field, x, some, steps, method, (rtol, atol)).cpu())
            bar.update(len(x))
    return torch.cat(images)


def _integrate(
    field: Velocity,
    x: Tensor,
    label: Tensor | None,
    steps: int,
    method: str,
    tolerances: tuple[float, float],
) -> Tensor:
    adaptive = method not in ("euler", "heun", *_FIXED)
    for start, stop in pairwise(_times(field, steps, adaptive)):
        ruling = field
        if isinstance(field, HybridVelocity):  # the switch is the end of a step: one field rules each
            ruling = field.before if start < field.tau else field.after
        if stop == 1:
            x = _close(ruling, x, start, label)
        elif method == "euler":
            x = x + (stop - start) * ruling(x, start, label)
        elif method == "heun":
            first = ruling(x, start, label)
            second = ruling(x + (stop - start) * first, stop, label)
            x = x + (stop - start) / 2 * (first + second)
        else:
            x = _solve(ruling, x, label, (start, stop), method, tolerances)
    return x


def _times(field: Velocity, steps: int, adaptive: bool) -> list[float]:
    """Ends of the steps from 0 to 1, with a hybrid's switch among them."""
    ends = [0.0, _LAST, 1.0] if adaptive else [step / steps for step in range(steps + 1)]
    if isinstance(field, HybridVelocity) and 0 < field.tau < 1:
        # in place of an end that is the same but for rounding: 3 / 10 and 0.1 + 0.2
        ends = [end for end in ends if end in (0, 1) or abs(end - field.tau) > _SAME_TIME] + [field.tau]
    return sorted(ends)


def _solve(
    field: Velocity,
    x: Tensor,
    label: Tensor | None,
    span: tuple[float, float],
    method: str,
    tolerances: tuple[float, float],
) -> Tensor:
    """One of torchdiffeq's solvers over `span`: one step of a fixed one, many of an adaptive one."""
    rtol, atol = tolerances

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        return field(x, t, label)

    ends = torch.tensor(span, device=x.device)
    # An adaptive solver steps past the end and interpolates back unless told to stop there, and looks for
    # its first step past the end of a short span unless given one.
    options = {} if method in _FIXED else {"step_t": ends[1:], "first_step": (span[1] - span[0]) / 50}
    return odeint(velocity, x, ends, method=method, rtol=rtol, atol=atol, options=options)[-1]


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
        mixed = (estimate.ess > 1 + 2 * _COLLAPSED).nonzero()[:, 0]
        if 1 - t < _NEAREST_END:
            break
        left = left[mixed]
        x = x[mixed] + (1 - t) / 2 * estimate.velocity[mixed]
        t = (1 + t) / 2
    return images
