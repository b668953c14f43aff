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

With settling times (`settling`), `efm` and `efm-unbiased` take x1 - x0 for every pair that has settled,
unasked: all but about a third of those at t ~ U[0, 1] on CIFAR-10 (docs/field.md, section 13).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nnflow.errors import InputError
from nnflow.memory import DEFAULT_BUDGET, rows_within
from nnflow.path import along, interpolate
from nnflow.pixels import HALF_RANGE
from nnflow.precision import full_float32
from nnflow.store import ImageStore
from nnflow.tally import Tally
from nnflow.velocity import EmpiricalVelocity, Estimate

TARGETS = ("cfm", "efm-m", "efm", "efm-unbiased")

_ALONE = 1e-6  # an image counts as alone in a sum whose ESS exceeds 1 by no more: 5e-7 for all others


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
        tally: where the estimates behind a target are counted.
    """

    x0: Float[Tensor, "B C H W"]
    x1: Float[Tensor, "B C H W"]
    xt: Float[Tensor, "B C H W"]
    t: Float[Tensor, " B"]
    ids: Int[Tensor, " B"] | None = None
    labels: Int[Tensor, " B"] | None = None
    flipped: Bool[Tensor, " B"] | None = None
    generator: torch.Generator | None = None
    tally: Tally | None = None

    def take(self, rows: Tensor | slice) -> "Pairs":
        """Some of the pairs, by number, mask or slice."""
        return replace(
            self,
            x0=self.x0[rows],
            x1=self.x1[rows],
            xt=self.xt[rows],
            t=self.t[rows],
            ids=None if self.ids is None else self.ids[rows],
            labels=None if self.labels is None else self.labels[rows],
            flipped=None if self.flipped is None else self.flipped[rows],
        )

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


class FieldTarget(Target):
    """What a field says, save for pairs whose u* is x1 - x0: those have settled.

    Args:
        field: u* or its estimate.
        settling: a time for each stored image from which on its pairs have settled
            (`settling.settling_times`); None asks the field about every pair.
    """

    def __init__(self, field: EmpiricalVelocity, *, settling: Float[Tensor, " n"] | None = None) -> None:
        if settling is not None and settling.shape != (len(field.store),):
            raise InputError(
                f"settling times of shape {tuple(settling.shape)}: wanted one for each of "
                f"{len(field.store)} stored images"
            )
        self.field = field
        self.settling = None if settling is None else settling.to(field.device)

    def __call__(self, pairs: Pairs) -> Float[Tensor, "B C H W"]:
        """x1 - x0 for pairs that have settled, what the field says for the others."""
        if self.settling is None or pairs.ids is None:
            return self.asked(pairs)
        velocity = pairs.x1 - pairs.x0
        rest = (pairs.t < self.settling[pairs.ids]).nonzero()[:, 0]
        if len(rest):
            velocity[rest] = self.asked(pairs.take(rest))
        return velocity

    @abstractmethod
    def asked(self, pairs: Pairs) -> Float[Tensor, "B C H W"]:
        """The target of pairs that have not settled, or of which that is not known."""

    def estimate(self, pairs: Pairs) -> Estimate:
        """What the field knows there; counted."""
        estimate = self.field.estimate(pairs.xt, pairs.t, pairs.labels)
        if pairs.tally is not None:
            pairs.tally.add(estimate)
        return estimate


class EmpiricalTarget(FieldTarget):
    """u* of a field, deterministic given x_t but for what `settling` leaves to chance."""

    def asked(self, pairs: Pairs) -> Float[Tensor, "B C H W"]:
        """The field's velocity at xt."""
        return pairs.velocity_of(self.estimate(pairs).mean)


class UnbiasedTarget(FieldTarget):
    """Unbiased for u* whatever the field's index finds, with no more variance than `cfm`.

    S is what the field sums in pixels; a far field is left out. Whether a pair has settled depends on x1,
    so images that have settled are no part of S: with them the target would be biased (docs/field.md,
    section 13). Only where the field sums all images do they stay, and the bias is at most eq. 20.
    """

    def __init__(
        self,
        field: EmpiricalVelocity,
        *,
        settling: Float[Tensor, " n"] | None = None,
        memory: int = DEFAULT_BUDGET,
    ) -> None:
        super().__init__(field.without_far(), settling=settling)
        self.memory = memory

    def asked(self, pairs: Pairs) -> Float[Tensor, "B C H W"]:
        """The field's velocity where x1 is among the images it summed, else x1 - x0.

        Raises:
            InputError: pairs without `ids`.
        """
        if pairs.ids is None:
            raise InputError("efm-unbiased needs to know which stored image x1 is: pass ids=")
        estimate = self.estimate(pairs)
        own = pairs.ids
        if pairs.flipped is not None:
            own = own + pairs.flipped * len(self.field.store)
        is_own = estimate.ids == own[:, None]
        velocity = pairs.velocity_of(self._among_unsettled(pairs, estimate, is_own))
        found = estimate.whole | is_own.any(1)
        return torch.where(found[:, None, None, None], velocity, pairs.x1 - pairs.x0)

    def _among_unsettled(
        self, pairs: Pairs, estimate: Estimate, is_own: Bool[Tensor, "B K"]
    ) -> Float[Tensor, "B C H W"]:
        """The mean over S less the images that have settled at t; of use where x1 is in S."""
        if self.settling is None:
            return estimate.mean
        known = estimate.ids >= 0
        settled = known & (self.settling[estimate.ids % len(self.settling)] <= pairs.t[:, None])
        # With one image alone in the sum, leaving out others changes nothing.
        rows = (settled.any(1) & (estimate.ess > 1 + _ALONE)).nonzero()[:, 0]
        if len(rows) == 0:
            return estimate.mean
        kept = (known & ~settled & ~is_own)[rows]
        mean = estimate.mean.clone()
        mean[rows] = _means(self.field.store, pairs.take(rows), estimate.ids[rows], kept, self.memory)
        return mean


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
        return pairs.velocity_of(_means(self.store, pairs, self._draw(pairs), None, self.memory))

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


def _means(
    store: ImageStore,
    pairs: Pairs,
    ids: Int[Tensor, "B m"],
    kept: Bool[Tensor, "B m"] | None,
    memory: int,
) -> Float[Tensor, "B C H W"]:
    """Soft-max means over x1 and the `ids` that are kept, in [0, 2n): n + i is the mirror image of i."""
    chunk = rows_within(memory, 12 * (ids.shape[1] + 1) * pairs.x1[0].numel(), at_most=len(ids), what="draws")
    means = []
    for start in range(0, len(ids), chunk):
        here = slice(start, start + chunk)
        means.append(_mean(store, pairs.take(here), ids[here], None if kept is None else kept[here]))
    return torch.cat(means).view_as(pairs.x1)


def _mean(
    store: ImageStore, pairs: Pairs, ids: Int[Tensor, "b m"], kept: Bool[Tensor, "b m"] | None
) -> Float[Tensor, "b D"]:
    x1, x0, time = pairs.x1.flatten(1), pairs.x0.flatten(1), pairs.t.double()
    images = store.pixels.index_select(0, (ids % len(store)).flatten().cpu())
    delta = images.to(x1.device).float().div_(HALF_RANGE).sub_(1)
    swap = (ids >= len(store)).flatten().to(x1.device)
    if swap.any():
        mirrored = delta.view(-1, *store.shape[1:]).flip(-1).flatten(1)
        delta = torch.where(swap[:, None], mirrored, delta)
    delta = delta.view(*ids.shape, x1.shape[1]).sub_(x1[:, None])
    # eq. 6 with the anchor x1, whose residual is (1 - t) x0
    along_noise = (1 - time[:, None]) * torch.einsum("bkd,bd->bk", delta, x0).double()
    square = delta.square().sum(2, dtype=torch.float64)
    gain = time / (1 - time).square()
    logits = gain[:, None] * (along_noise - 0.5 * time[:, None] * square)
    if kept is not None:
        logits = logits.masked_fill(~kept, -torch.inf)
    weights = torch.nn.functional.pad(logits, (1, 0)).softmax(1)[:, 1:].float()
    return x1 + torch.einsum("bk,bkd->bd", weights, delta)


class EmpiricalFlowMatcher:
    """Draws (t, x_t, u_t) for a batch of pairs; stands where a torchcfm flow matcher stands.

    Args:
        target: a `Target`, or a field for the target `efm`.
    """

    def __init__(self, target: Target | EmpiricalVelocity) -> None:
        self.target = EmpiricalTarget(target) if isinstance(target, EmpiricalVelocity) else target

    @full_float32()
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
        tally: Tally | None = None,
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
            tally: where the estimates behind the targets are counted.

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
            tally=tally,
        )
        return t, pairs.xt, self.target(pairs)


def make_matcher(
    name: str,
    store: ImageStore,
    *,
    field: EmpiricalVelocity | None = None,
    settling: Float[Tensor, " n"] | None = None,
    samples: int = 128,
    flip: bool = False,
    memory: int = DEFAULT_BUDGET,
) -> EmpiricalFlowMatcher:
    """The matcher of one of `TARGETS`.

    Args:
        name: one of `TARGETS`.
        store: the training images.
        field: u* or its estimate, for `efm` and `efm-unbiased`.
        settling: for those two, times from which on an image's pairs have settled.
        samples: M of `efm-m`, x1 included.
        flip: whether training mirrors images at random; `efm-m` then draws mirror images too. A field says
            so itself.
        memory: working memory in bytes of `efm-m` and of `efm-unbiased`, beside the field's.

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
    if name == "efm":
        return EmpiricalFlowMatcher(EmpiricalTarget(field, settling=settling))
    return EmpiricalFlowMatcher(UnbiasedTarget(field, settling=settling, memory=memory))
