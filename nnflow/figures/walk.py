"""Trajectories step by step, with all that is known on the way: x_t, m(x_t, t), effective number of images.

    x <- x + (dt / (1 - t)) (m - x)

is Euler's step of dx/dt = u(x, t); for u* it is exact while m stays what it is, and m is one image for good
once one image holds all of the mass (docs/field.md, section 7). t = 0 is noise, t = 1 data.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nnflow.path import mean_from_velocity, velocity_from_mean
from nnflow.sampling import is_one_image
from nnflow.scan import nearest_images
from nnflow.store import ImageStore
from nnflow.unet import LearnedVelocity
from nnflow.velocity import EmpiricalVelocity

_EARLIEST = 1e-3  # the weights of t = 0 are all the same: no image leads before


@dataclass(frozen=True)
class State:
    """S trajectories at one time.

    Attributes:
        t: 0 = noise, 1 = data.
        x: where they are.
        mean: m(x, t) = x + (1 - t) u(x, t) of the field that moves them.
        ess: effective number of images at x by u*, whichever field moves them.
        going: whether they may still change their image; those of u* do not once it is one.
    """

    t: float
    x: Float[Tensor, "S C H W"]
    mean: Float[Tensor, "S C H W"]
    ess: Float[Tensor, " S"]
    going: Bool[Tensor, " S"]


def walk(
    field: EmpiricalVelocity, noise: Float[Tensor, "S C H W"], steps: int, label: Tensor | None = None
) -> Iterator[State]:
    """Along u* in `steps` equal steps: the state at the start of each; the last one ends on its mean."""
    x = noise.to(field.device)
    mean, ess = torch.zeros_like(x), torch.ones(len(x), device=x.device)
    left = torch.arange(len(x), device=x.device)
    label = None if label is None else label.to(x.device)
    for step in range(steps):
        t = step / steps
        going = torch.zeros(len(x), dtype=torch.bool)
        going[left.cpu()] = True
        if len(left):
            estimate = field.estimate(x[left], t, None if label is None else label[left])
            mean[left], ess[left] = estimate.mean, estimate.ess
            left = left[~is_one_image(estimate)]
        yield State(t, x.cpu(), mean.cpu().clone(), ess.cpu().clone(), going)
        x = x + velocity_from_mean(mean, x, t) / steps


def walk_learned(
    learned: LearnedVelocity,
    field: EmpiricalVelocity,
    noise: Float[Tensor, "S C H W"],
    steps: int,
    label: Tensor | None = None,
) -> Iterator[State]:
    """Along u_theta likewise, looked at by u*."""
    x = noise.to(learned.device)
    for step in range(steps):
        t = step / steps
        velocity = learned(x, t, label if learned.classes else None)
        estimate = field.estimate(x, t, label)
        mean = mean_from_velocity(velocity, x, t)
        yield State(t, x.cpu(), mean.cpu(), estimate.ess.cpu(), torch.ones(len(x), dtype=torch.bool))
        x = x + velocity / steps


def leading(
    store: ImageStore,
    state: State,
    before: Int[Tensor, " S"] | None,
    label: Tensor | None = None,
    *,
    flip: bool = False,
    memory: int,
) -> Int[Tensor, " S"]:
    """The image with the largest weight at each x_t: the one nearest to x_t / t; -1 at t = 0.

    Args:
        store: the images.
        state: of the trajectories.
        before: those of the step before, which trajectories that are not `going` keep.
        label: restricts each to one class.
        flip: mirror images count too, as n + their image's row.
        memory: working memory in bytes.
    """
    if state.t < _EARLIEST:
        return torch.full((len(state.x),), -1)
    queries = state.x / state.t
    found = torch.full((len(queries),), -1) if before is None else before.clone()
    labels = torch.full((len(queries),), -1) if label is None else label.cpu()
    going = state.going | (found < 0)
    for value in labels[going].unique().tolist():
        rows = (going & (labels == value)).nonzero()[:, 0]
        images = slice(0, len(store)) if value < 0 else store.class_rows(value)
        found[rows] = _nearest(store, queries[rows], images, flip=flip, memory=memory)
    return found


def _nearest(store: ImageStore, x: Tensor, images: slice, *, flip: bool, memory: int) -> Tensor:
    pixels = store.pixels[images]
    shape = (len(pixels), *store.shape[1:])
    part = replace(store, pixels=pixels, labels=store.labels[images], shape=shape)
    near = nearest_images(part, x, 1, memory=memory)
    ids, distances = near.ids[:, 0] + images.start, near.distances[:, 0]
    if flip:
        other = nearest_images(part, x.flip(-1), 1, memory=memory)
        mirrored = other.distances[:, 0] < distances
        ids = torch.where(mirrored, other.ids[:, 0] + images.start + len(store), ids)
    return ids
