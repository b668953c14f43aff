"""What a network is regressed on at x_t, from the noisiest estimate of u* to u* itself.

| name         | target at (x_t, t, x1)                                                          |
|--------------|---------------------------------------------------------------------------------|
| cfm          | x1 - x0                                                                         |
| efm-m        | soft-max mean over x1 and M - 1 uniform draws (arXiv 2506.03719)                |
| efm          | u* from a field                                                                 |
| efm-unbiased | S = what the field retrieves at x_t; its mean if x1 is in S, else x1 - x0       |

All have mean u*(x_t, t) given x_t, except `efm` with a field that leaves images out. `efm-unbiased` has
it for any index: x1 given x_t has the law w of eq. 3, and S does not depend on x1
(docs/field.md, section 5).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nnflow.errors import InputError
from nnflow.memory import DEFAULT_BUDGET, rows_within
from nnflow.path import along, interpolate
from nnflow.pixels import HALF_RANGE
from nnflow.store import ImageStore
from nnflow.velocity import EmpiricalVelocity

TARGETS = ("cfm", "efm-m", "efm", "efm-unbiased")


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """B training pairs on their straight paths.

    Attributes:
        x0: noise.
        x1: data.
        xt: (1 - t) x0 + t x1.
        t: in [0, 1).
        ids: which stored image x1 is.
        labels: its class, for class-conditional training.
        flipped: whether x1 is its mirror image.
        generator: of a target's own draws.
    """

    x0: Float[Tensor, "B C H W"]
    x1: Float[Tensor, "B C H W"]
    xt: Float[Tensor, "B C H W"]
    t: Float[Tensor, " B"]
    ids: Int[Tensor, " B"] | None = None
    labels: Int[Tensor, " B"] | None = None
    flipped: Bool[Tensor, " B"] | None = None
    generator: torch.Generator | None = None

    def velocity_of(self, mean: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """(mean - xt) / (1 - t), written so that it is x1 - x0 where the mean is x1.

        mean - xt cancels to a float32 rounding of 1e-7, which 1 / (1 - t) multiplies: at t = 1 - 1e-6 that
        is a tenth of a standard deviation.
        """
        return self.x1 - self.x0 + (mean - self.x1) / (1 - along(self.t, self.x1))


class Target(ABC):
    """A regression target; build once, call for every batch."""

    @abstractmethod
    def __call__(self, pairs: Pairs) -> Float[Tensor, "B C H W"]:
        """Velocity to regress on at `pairs.xt`."""


class ConditionalTarget(Target):
    """x1 - x0: conditional flow matching (Lipman et al. 2023, arXiv 2210.02747)."""

    def __call__(self, pairs: Pairs) -> Float[Tensor, "B C H W"]:
        """x1 - x0."""
        return pairs.x1 - pairs.x0


class EmpiricalTarget(Target):
    """u* of a field, deterministic given x_t."""

    def __init__(self, field: EmpiricalVelocity) -> None:
        self.field = field

    def __call__(self, pairs: Pairs) -> Float[Tensor, "B C H W"]:
        """The field's velocity at xt."""
        return pairs.velocity_of(self.field.mean(pairs.xt, pairs.t, pairs.labels))


class UnbiasedTarget(Target):
    """Unbiased for u* whatever the field's index finds, with no more variance than `cfm`."""

    def __init__(self, field: EmpiricalVelocity) -> None:
        self.field = field

    def __call__(self, pairs: Pairs) -> Float[Tensor, "B C H W"]:
        """The field's velocity where x1 is among the images it summed, else x1 - x0.

        Raises:
            InputError: pairs without `ids`.
        """
        if pairs.ids is None:
            raise InputError("efm-unbiased needs to know which stored image x1 is: pass ids=")
        estimate = self.field.estimate(pairs.xt, pairs.t, pairs.labels)
        velocity = pairs.velocity_of(estimate.mean)
        if estimate.ids is None:  # every image was summed, x1 among them
            return velocity
        own = pairs.ids
        if pairs.flipped is not None:
            own = own + pairs.flipped * len(self.field.store)
        found = (estimate.ids == own[:, None]).any(1)
        return torch.where(found[:, None, None, None], velocity, pairs.x1 - pairs.x0)


class MinibatchTarget(Target):
    """Soft-max mean over x1 and M - 1 images drawn for each pair, uniformly with replacement."""

    def __init__(
        self, store: ImageStore, *, samples: int = 128, flip: bool = False, memory: int = DEFAULT_BUDGET
    ) -> None:
        if samples < 1:
            raise InputError(f"samples = {samples}: efm-m sums at least x1 itself")
        self.store, self.samples, self.flip, self.memory = store, samples, flip, memory

    def __call__(self, pairs: Pairs) -> Float[Tensor, "B C H W"]:
        """Velocity towards the mean of the M images."""
        draws = self._draw(pairs)
        flat = pairs.x1.flatten(1)
        chunk = rows_within(self.memory, 12 * self.samples * flat.shape[1], at_most=len(flat), what="draws")
        means = [
            self._mean(pairs, draws, slice(start, start + chunk)) for start in range(0, len(flat), chunk)
        ]
        return pairs.velocity_of(torch.cat(means).view_as(pairs.x1))

    def _draw(self, pairs: Pairs) -> Int[Tensor, "B m"]:
        """Ids in [0, n), or [0, 2n) with mirror images."""
        size = (len(pairs.x1), self.samples - 1)
        uniform = torch.rand(size, dtype=torch.float64, generator=pairs.generator)
        first = torch.zeros(len(pairs.x1), 1, dtype=torch.int64)
        count = torch.full_like(first, len(self.store))
        if pairs.labels is not None:
            rows = [self.store.class_rows(label) for label in pairs.labels.tolist()]
            first = torch.tensor([[row.start] for row in rows])
            count = torch.tensor([[row.stop - row.start] for row in rows])
        ids = first + (uniform * count).long()
        if self.flip:
            ids += torch.randint(2, size, generator=pairs.generator) * len(self.store)
        return ids

    def _mean(self, pairs: Pairs, draws: Int[Tensor, "B m"], here: slice) -> Float[Tensor, "b D"]:
        x1, x0, time = pairs.x1[here].flatten(1), pairs.x0[here].flatten(1), pairs.t[here].double()
        mine = draws[here]
        images = self.store.pixels.index_select(0, (mine % len(self.store)).flatten())
        delta = images.to(x1.device).float().div_(HALF_RANGE).sub_(1)
        if self.flip:
            mirrored = delta.view(-1, *self.store.shape[1:]).flip(-1).flatten(1)
            swap = (mine >= len(self.store)).flatten().to(x1.device)
            delta = torch.where(swap[:, None], mirrored, delta)
        delta = delta.view(*mine.shape, x1.shape[1]).sub_(x1[:, None])
        # eq. 6 with the anchor x1, whose residual is (1 - t) x0
        along_noise = (1 - time[:, None]) * torch.einsum("bkd,bd->bk", delta, x0).double()
        square = delta.square().sum(2, dtype=torch.float64)
        gain = time / (1 - time).square()
        logits = gain[:, None] * (along_noise - 0.5 * time[:, None] * square)
        weights = torch.nn.functional.pad(logits, (1, 0)).softmax(1)[:, 1:].float()
        return x1 + torch.einsum("bk,bkd->bd", weights, delta)


class EmpiricalFlowMatcher:
    """Draws (t, x_t, u_t) for a batch of pairs; stands where a torchcfm flow matcher stands.

    Args:
        target: a `Target`, or a field for the target `efm`.
    """

    def __init__(self, target: Target | EmpiricalVelocity) -> None:
        self.target = EmpiricalTarget(target) if isinstance(target, EmpiricalVelocity) else target

    @torch.no_grad()
    def sample_location_and_conditional_flow(
        self,
        x0: Tensor,
        x1: Tensor,
        t: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        labels: Tensor | None = None,
        flipped: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, " B"], Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
        """A point on each pair's straight path and the velocity to regress on there.

        Args:
            x0: noise, float32 (B, C, H, W).
            x1: data, the same shape, in [-1, 1].
            t: times in [0, 1), (B,); uniform when None.
            ids: which stored image each x1 is, int64 (B,); `efm-unbiased` needs it.
            labels: classes of x1, int64 (B,), for class-conditional training.
            flipped: whether each x1 is a mirror image, bool (B,).
            generator: of the times (when `t` is None) and of a target's own draws, on the CPU.

        Returns:
            t (B,), xt (B, C, H, W), ut (B, C, H, W).

        Raises:
            InputError: x0 and x1 of different shapes, times outside [0, 1), ids the target needs and lacks.
        """
        if x0.shape != x1.shape:
            raise InputError(f"noise of shape {tuple(x0.shape)}, data of {tuple(x1.shape)}: wanted the same")
        if t is None:
            t = torch.rand(len(x1), generator=generator).to(x1.device)
        t = t.float()  # before it is checked: 1 - 1e-9 in float64 is 1 in float32
        if t.shape != (len(x1),) or not bool(((t >= 0) & (t < 1)).all()):
            raise InputError(f"t of shape {tuple(t.shape)}: wanted ({len(x1)},), each in [0, 1)")
        pairs = Pairs(
            x0=x0,
            x1=x1,
            xt=interpolate(x0, x1, t),
            t=t,
            ids=ids,
            labels=labels,
            flipped=flipped,
            generator=generator,
        )
        return t, pairs.xt, self.target(pairs)


def make_matcher(
    name: str,
    store: ImageStore,
    *,
    field: EmpiricalVelocity | None = None,
    samples: int = 128,
    flip: bool = False,
    memory: int = DEFAULT_BUDGET,
) -> EmpiricalFlowMatcher:
    """The matcher of one of `TARGETS`.

    Args:
        name: one of `TARGETS`.
        store: the training images.
        field: u* or its estimate, for `efm` and `efm-unbiased`.
        samples: M of `efm-m`, x1 included.
        flip: whether training mirrors images at random; `efm-m` then draws mirror images too. A field says
            so itself.
        memory: working memory of `efm-m` in bytes.

    Raises:
        InputError: an unknown name, or a field missing or made without mirror images.
    """
    if name == "cfm":
        return EmpiricalFlowMatcher(ConditionalTarget())
    if name == "efm-m":
        return EmpiricalFlowMatcher(MinibatchTarget(store, samples=samples, flip=flip, memory=memory))
    if name not in TARGETS:
        raise InputError(f"target {name!r}: wanted one of {', '.join(TARGETS)}")
    if field is None or field.flip != flip:
        raise InputError(f"target {name}: wanted a field made with flip={flip}")
    return EmpiricalFlowMatcher(EmpiricalTarget(field) if name == "efm" else UnbiasedTarget(field))
