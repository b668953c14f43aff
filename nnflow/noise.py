"""How noisy a regression target is at a point, and how noisy the gradient it gives a network.

    T | x_t :  x1 = x_i with probability w_i (docs/field.md, eq. 3),  x0 = (x_t - t x_i) / (1 - t)   (1)
    V_T(t) = E_{x_t} tr Cov(T | x_t) / D                                                      (2)
    g = grad_theta  sum_b |u_theta(x_b, t) - T_b|^2 / (B D)                                   (3)
    tr Cov(g) = E tr Cov(g | x_1 ... x_B) + tr Cov(E[g | x_1 ... x_B])                         (4)

The first term of (4) is what the target adds, the second is there with u* itself as target. By (3) g is
linear in T, so that its deviations are those of T sent back through the network, not differences of large
gradients. t = 0 is noise, t = 1 data.

Axes:  B points of a batch   R redraws at each   K batches   n images   D = C*H*W values of one image
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nnflow.errors import InputError
from nnflow.memory import DEFAULT_BUDGET, rows_within
from nnflow.pairs import Pairs
from nnflow.path import interpolate
from nnflow.store import ImageStore
from nnflow.targets import EmpiricalFlowMatcher


@dataclass(frozen=True, kw_only=True)
class TargetNoise:
    """Variances of one target at each of `times`, all at the same weights.

    Attributes:
        times: 0 = noise, 1 = data.
        target: eq. 2, per value of an image; None for a target whose law given x_t is not known.
        gradient_target: first term of eq. 4, the share of the target, for batches of `batch`; or None.
        gradient: eq. 4, all of it.
        loss: mean of |u_theta - T|^2 / D over the batches: what training minimises at that time.
        batch: B.
        draws: R.
        batches: K.
        seed: of the batches, which are the same for every target.
    """

    times: tuple[float, ...]
    target: tuple[float, ...] | None
    gradient_target: tuple[float, ...] | None
    gradient: tuple[float, ...]
    loss: tuple[float, ...]
    batch: int
    draws: int
    batches: int
    seed: int


def target_noise(
    network: nn.Module,
    store: ImageStore,
    matchers: Mapping[str, EmpiricalFlowMatcher],
    *,
    times: Sequence[float],
    batch: int = 64,
    draws: int = 4,
    batches: int = 8,
    seed: int = 0,
    flip: bool = False,
    memory: int = DEFAULT_BUDGET,
) -> dict[str, TargetNoise]:
    """Eqs. 2 and 4 of each matcher's target, at the weights of `network` and over the same batches.

    Unbiased estimates: R redraws at each of the K B points for eq. 2 and the first term of eq. 4, K
    gradients for all of eq. 4.

    Args:
        network: called as network(x, t), on the CPU or where the matchers' fields are.
        store: the training images.
        matchers: by name of target.
        times: in [0, 1).
        batch: B, as in training: the variance of a gradient falls with it.
        draws: R, at least 2.
        batches: K, at least 2.
        seed: of batches and redraws.
        flip: whether the images are mirrored at random.
        memory: working memory in bytes for the redraws.

    Raises:
        InputError: fewer than two draws or batches.
    """
    if draws < 2 or batches < 2:
        raise InputError(f"{draws} draws, {batches} batches: a variance needs at least two of each")
    study = _Study(network, store, batch, draws, batches, seed, flip, memory)
    with _differentiable(network):
        found = [study.at(t, number, matchers) for number, t in enumerate(times)]
    return {name: _joined([here[name] for here in found], tuple(times), study) for name in matchers}


def through(
    store: ImageStore,
    xt: Float[Tensor, "B C H W"],
    t: float,
    draws: int,
    *,
    generator: torch.Generator,
    flip: bool = False,
    memory: int = DEFAULT_BUDGET,
) -> Pairs:
    """`draws` training pairs through each of the points `xt` at time `t`, from their law of eq. 1.

    Row b * draws + r is the r-th pair of point b.

    Args:
        store: the training images.
        xt: points, float32.
        t: in [0, 1).
        draws: R.
        generator: of the draws.
        flip: whether the images are mirrored at random: 2n images.
        memory: working memory in bytes.
    """
    logits = _logits(store, xt, t, memory)
    if flip:
        logits = torch.cat([logits, _logits(store, xt.flip(-1), t, memory)], 1)
    drawn = logits.softmax(1).multinomial(draws, replacement=True, generator=generator).flatten()
    ids, flipped = drawn % len(store), drawn >= len(store)
    x1 = store.images(ids)
    x1 = torch.where(flipped[:, None, None, None], x1.flip(-1), x1).to(xt.device)
    points = xt.repeat_interleave(draws, 0)
    return Pairs(
        x0=(points - t * x1) / (1 - t),
        x1=x1,
        xt=points,
        t=torch.full((len(points),), t, device=xt.device),
        ids=ids.to(xt.device),
        flipped=flipped.to(xt.device) if flip else None,
        generator=generator,
    )


def _logits(store: ImageStore, xt: Tensor, t: float, memory: int) -> Float[Tensor, "B n"]:
    """Those of eq. 3 of docs/field.md, in float64: by expansion they err by 1e-10 there, not by 0.4."""
    x = xt.flatten(1).double().cpu()
    rows = rows_within(memory, 20 * x.shape[1], at_most=len(store), what="images", share=2)
    blocks = []
    for ids in torch.arange(len(store)).split(rows):
        images = store.images(ids).flatten(1).double()
        blocks.append((t * (x @ images.T) - t * t / 2 * images.square().sum(1)) / (1 - t) ** 2)
    return torch.cat(blocks, 1)


def target_variance(targets: Float[Tensor, "B R C H W"]) -> Float[Tensor, " B"]:
    """Eq. 2 at each point, unbiased, per value: float64."""
    return targets.flatten(2).double().var(1).mean(1)


def gradient_deviations(
    network: nn.Module, xt: Float[Tensor, "B C H W"], t: Tensor, targets: Float[Tensor, "B R C H W"]
) -> float:
    """First term of eq. 4 at these points, unbiased: sum_r |g_r - mean g|^2 / (R - 1)."""
    apart = targets - targets[:, :1]  # exactly 0 where the redraws agree: their mean would be rounded
    deviations = apart - apart.mean(1, keepdim=True)
    velocity = network(xt, t)
    parameters = list(network.parameters())
    scale = 2 / velocity.numel()
    total, draws = 0.0, targets.shape[1]
    for r in range(draws):
        parts = torch.autograd.grad(
            velocity, parameters, scale * deviations[:, r], retain_graph=r + 1 < draws, allow_unused=True
        )
        total += sum(float(part.double().square().sum()) for part in parts if part is not None)
    return total / (draws - 1)


@dataclass(frozen=True)
class _AtTime:
    target: float | None
    gradient_target: float | None
    gradient: float
    loss: float


@dataclass(frozen=True)
class _Study:
    """What all targets are measured on."""

    network: nn.Module
    store: ImageStore
    batch: int
    draws: int
    batches: int
    seed: int
    flip: bool
    memory: int

    def at(self, t: float, number: int, matchers: Mapping[str, EmpiricalFlowMatcher]) -> dict[str, _AtTime]:
        """Every target at the time numbered so."""
        sums = {name: _Sums() for name in matchers}
        seeds = torch.randint(2**62, (number + 1, self.batches, 3), generator=_drawing(self.seed))[number]
        for own, others, targets in seeds.tolist():
            pairs = self._pairs(t, _drawing(own))
            again = through(
                self.store, pairs.xt, t, self.draws,
                generator=_drawing(others), flip=self.flip, memory=self.memory,
            )  # fmt: skip
            for name, matcher in matchers.items():
                sums[name].add(self.network, matcher, pairs, again, targets)
        return {name: total.done() for name, total in sums.items()}

    def _pairs(self, t: float, generator: torch.Generator) -> Pairs:
        """A training batch, all of it at time `t`."""
        place = next(self.network.parameters()).device
        ids = torch.randint(len(self.store), (self.batch,), generator=generator)
        x1, flipped = self.store.images(ids), None
        if self.flip:
            flipped = torch.rand(self.batch, generator=generator) < 0.5
            x1 = torch.where(flipped[:, None, None, None], x1.flip(-1), x1)
        x0 = torch.randn(x1.shape, generator=generator)
        return Pairs(
            x0=x0.to(place),
            x1=x1.to(place),
            xt=interpolate(x0, x1, t).to(place),
            t=torch.full((self.batch,), t, device=place),
            ids=ids.to(place),
            flipped=None if flipped is None else flipped.to(place),
        )


class _Sums:
    """Means and variances over the batches at one time, one batch after the other (Welford 1962)."""

    def __init__(self) -> None:
        self.count, self.squares, self.loss = 0, 0.0, 0.0
        self.target: list[float] = []
        self.deviations: list[float] = []
        self.mean: Tensor | float = 0.0

    def add(
        self, network: nn.Module, matcher: EmpiricalFlowMatcher, pairs: Pairs, again: Pairs, seed: int
    ) -> None:
        """One batch, and redraws through its points for a target that has a law there."""
        generator = _drawing(seed)
        xt, ut = _asked(matcher, pairs, generator)
        loss, gradient = batch_gradient(network, xt, pairs.t, ut)
        self.count += 1
        self.loss += (loss - self.loss) / self.count
        apart = gradient - self.mean
        self.mean = self.mean + apart / self.count
        self.squares += float(apart @ (gradient - self.mean))
        if not matcher.transport:
            _, ut = _asked(matcher, again, generator)
            targets = ut.view(len(pairs.xt), -1, *ut.shape[1:])
            self.target.append(float(target_variance(targets).mean()))
            self.deviations.append(gradient_deviations(network, pairs.xt, pairs.t, targets))

    def done(self) -> _AtTime:
        """What came of it."""
        return _AtTime(
            target=sum(self.target) / self.count if self.target else None,
            gradient_target=sum(self.deviations) / self.count if self.target else None,
            gradient=self.squares / (self.count - 1),
            loss=self.loss,
        )


def batch_gradient(
    network: nn.Module, xt: Float[Tensor, "B C H W"], t: Tensor, ut: Float[Tensor, "B C H W"]
) -> tuple[float, Float[Tensor, " P"]]:
    """The loss of one batch and its gradient, eq. 3, in float64."""
    loss = nn.functional.mse_loss(network(xt, t), ut)
    parameters = list(network.parameters())
    parts = torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)
    return loss.item(), torch.cat([part.flatten().double() for part in parts])


def _asked(matcher: EmpiricalFlowMatcher, pairs: Pairs, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x_t and the target there."""
    _, xt, ut = matcher.sample_location_and_conditional_flow(
        pairs.x0, pairs.x1, pairs.t, ids=pairs.ids, flipped=pairs.flipped, generator=generator
    )
    return xt, ut


def _drawing(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@contextlib.contextmanager
def _differentiable(network: nn.Module) -> Iterator[None]:
    """Gradients for the weights, and dropout off; both as they were afterwards."""
    before = [parameter.requires_grad for parameter in network.parameters()]
    training = network.training
    try:
        network.requires_grad_(True).eval()
        yield
    finally:
        network.train(training)
        for parameter, wanted in zip(network.parameters(), before, strict=True):
            parameter.requires_grad_(wanted)


def _joined(parts: Sequence[_AtTime], times: tuple[float, ...], study: _Study) -> TargetNoise:
    def known(values: list[float | None]) -> tuple[float, ...] | None:
        there = tuple(value for value in values if value is not None)
        return there if len(there) == len(values) else None

    return TargetNoise(
        times=times,
        target=known([part.target for part in parts]),
        gradient_target=known([part.gradient_target for part in parts]),
        gradient=tuple(part.gradient for part in parts),
        loss=tuple(part.loss for part in parts),
        batch=study.batch,
        draws=study.draws,
        batches=study.batches,
        seed=study.seed,
    )
