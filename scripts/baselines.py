"""Other ways to estimate u*(x, t), as their authors describe them: what the benchmarks compare nnflow with.

Each estimates the posterior mean m of docs/field.md, eq. 1; the velocity is (m - x) / (1 - t).

| class    | images that enter                                                      |
|----------|------------------------------------------------------------------------|
| `Halves` | all, by products of bf16 numbers                                       |
| `Top`    | the k of largest logit                                                 |
| `Draws`  | M uniform draws, and the image x1 the query was made from: efm-m       |
| `Deann`  | the k nearest, and uniform draws that stand for all others             |
| `Snis`   | m draws from a proposal made of the k nearest (Niedoba et al. 2024)    |

They stand on nnflow's own ground: pixels as bytes, `weigh` for the images that matter, eq. 4 to merge parts.

Axes:  B queries   n images   R images of a block   K images of one query   M draws   D = C*H*W
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nnflow import ImageStore, NeighbourIndex
from nnflow.memory import DEFAULT_BUDGET, rows_within
from nnflow.nearfield import by_difference, weigh
from nnflow.path import velocity_from_mean

_WEIGHED = 32  # images per query weighed by difference, as many as the exact field takes
_LIGHT = 1e-8  # share of the mass that is not worth a pass over the images; the exact field's own
_SEARCH_TIME = 0.01  # x / t grows without bound: `EmpiricalVelocity.nearest` searches as if no earlier
_CACHE_BYTES = 3 << 19  # images gathered at once, as in nnflow.nearfield


class Scan:
    """All images as one pass each of logits and of means, by bf16 halves; shared by the estimators.

    A byte is exact in bf16, and a float32 is the sum of two bf16 numbers to 17 bits: two products do for
    one in float32, at half the memory and, where a device multiplies bf16 faster, in less time.
    """

    def __init__(
        self, store: ImageStore, *, memory: int = DEFAULT_BUDGET, device: torch.device | str = "cpu"
    ) -> None:
        self.rows = store.rows(device)
        self.norms = self.rows.squared_norms(memory).float()
        self.memory = memory

    def chunk(self, queries: int) -> int:
        """Queries whose logits fit in half the memory, twice."""
        return rows_within(self.memory, 8 * self.rows.count, at_most=queries, what="logits", share=2)

    def logits(self, x: Float[Tensor, "B D"], t: Float[Tensor, " B"]) -> Float[Tensor, "B n"]:
        """Eq. 5 for all images."""
        scale, offset = _factors(t)
        halves = _split(x * (scale / self.rows.codec.unit)[:, None])
        logits = x.new_empty(len(x), self.rows.count)
        for start, stop, block in self._blocks():
            logits[:, start:stop] = _product(halves, block.T).addr_(offset, self.norms[start:stop])
        return logits

    def mean(self, weights: Float[Tensor, "B n"]) -> Float[Tensor, "B D"]:
        """Mean of all images under `weights` that sum to 1."""
        total = weights.new_zeros(len(weights), self.rows.dim)
        for start, stop, block in self._blocks():
            total += _product(_split(weights[:, start:stop]), block)
        return self.rows.codec.values_(total)

    def images(self, ids: Int[Tensor, " M"]) -> Float[Tensor, "M D"]:
        """Some images, in [-1, 1]."""
        return self.rows.values(ids)

    def _blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        step = self.rows.block_rows(self.memory)
        room = torch.empty(step, self.rows.dim, dtype=torch.bfloat16, device=self.rows.device)
        for start in range(0, self.rows.count, step):
            stop = min(start + step, self.rows.count)
            yield start, stop, self.rows.read(start, stop, room)


class Baseline(ABC):
    """An estimator of u*; build once, call for every batch."""

    def __init__(self, scan: Scan, *, needs_all: bool) -> None:
        """`needs_all`: whether the logits of all images are held, so that few queries fit at a time."""
        self.scan, self.needs_all = scan, needs_all

    @abstractmethod
    def mean(
        self, x: Float[Tensor, "B D"], t: Float[Tensor, " B"], own: Int[Tensor, " B"]
    ) -> Float[Tensor, "B D"]:
        """Posterior mean at `x`; `own` as in a call."""

    @torch.no_grad()
    def __call__(
        self, x: Float[Tensor, "B C H W"], t: Float[Tensor, " B"], own: Int[Tensor, " B"]
    ) -> Float[Tensor, "B C H W"]:
        """Velocity at `x`.

        Args:
            x: queries (1 - t) x0 + t x1.
            t: their times, in [0, 1).
            own: which stored image each x1 is; only efm-m looks at it.
        """
        step = self.scan.chunk(len(x)) if self.needs_all else len(x)
        pieces = zip(x.flatten(1).split(step), t.split(step), own.split(step), strict=True)
        mean = torch.cat([self.mean(*piece) for piece in pieces])
        return velocity_from_mean(mean.view_as(x), x, t)


class Halves(Baseline):
    """The whole sum, its products by bf16 halves, the 32 heaviest images by difference."""

    def __init__(self, scan: Scan) -> None:
        super().__init__(scan, needs_all=True)

    def mean(self, x: Tensor, t: Tensor, own: Tensor) -> Tensor:  # noqa: ARG002
        """All images, in two passes; one for queries whose mass lies on 32 of them."""
        logits = self.scan.logits(x, t)
        highest, places = logits.topk(min(_WEIGHED, logits.shape[1]), dim=1)
        near = weigh(self.scan.rows, places, x, t, budget=self.scan.memory, norms=self.scan.norms)
        weights = logits.sub_(highest[:, :1]).clamp_min_(-80.0).exp_()  # below exp(-87) products crawl
        weights.div_(weights.sum(1, keepdim=True))
        mean = near.mean
        rest = (1 - weights.gather(1, places).sum(1) > _LIGHT).nonzero()[:, 0]
        if len(rest):
            mean[rest] = self.scan.mean(weights[rest])
        return mean


class Top(Baseline):
    """The k images of largest logit, found among all and weighed by difference."""

    def __init__(self, scan: Scan, *, k: int) -> None:
        super().__init__(scan, needs_all=True)
        self.k = min(k, scan.rows.count)

    def mean(self, x: Tensor, t: Tensor, own: Tensor) -> Tensor:  # noqa: ARG002
        """Soft-max mean of k images."""
        ids = self.scan.logits(x, t).topk(self.k, dim=1).indices
        return weigh(self.scan.rows, ids, x, t, budget=self.scan.memory, norms=self.scan.norms).mean


class Draws(Baseline):
    """efm-m: the soft-max mean of M uniform draws and x1 (Bertrand et al. 2025, arXiv 2506.03719).

    As in the authors' released training code, the draws are shared by the batch, whose own x1 join them:
    two matrix products, and each query's estimate has the law of draws of its own. Without x1
    (`with_own=False`) it can be asked at any x, but is no longer unbiased: that variant is not theirs.
    Ours is that draws are made with replacement; their loader's are not.
    """

    def __init__(self, scan: Scan, *, draws: int, seed: int, with_own: bool = True) -> None:
        super().__init__(scan, needs_all=False)
        self.draws, self.with_own = draws, with_own
        self._generator = torch.Generator(scan.rows.device).manual_seed(seed)

    def mean(self, x: Tensor, t: Tensor, own: Tensor) -> Tensor:
        """Soft-max mean of the draws, and of the batch's own images."""
        ids = _uniform(self.scan, (self.draws,), self._generator)
        _, mean = _shared_sum(self.scan, torch.cat([own, ids]) if self.with_own else ids, x, t)
        return mean


class Deann(Baseline):
    """The k nearest, and uniform draws scaled up to all others (Karppa, Aumueller, Pagh, AISTATS 2022).

    DEANN estimates a kernel density as the kernels of (approximately) nearest neighbours plus (n - k)
    times the mean kernel of m random others. Here the kernel is exp(l_i); numerator sum_i exp(l_i) x_i and
    denominator of the mean are estimated by the same images. As in the authors' faster variant the random
    images are one block for many queries, neighbours of a query left out of its own.

    Ours: the ratio of two such sums, which is consistent but not unbiased; the block is drawn anew for
    each batch; and k and m, which the authors tune to the data. On CIFAR-10 at t = .1 the error's 99th
    percentile over 128 queries is 11 % for (k, m) = (100, 1,000), 5 % for (100, 4,000), 6 % for
    (1,000, 1,000), 1.9 % for (1,000, 4,000) and 1.4 % for (1,000, 10,000), neighbours from the index.
    """

    def __init__(
        self, scan: Scan, *, k: int, draws: int, seed: int, index: NeighbourIndex | None = None
    ) -> None:
        """With `index` its candidates are the neighbours: an approximate search, as theirs. Else a scan."""
        super().__init__(scan, needs_all=index is None)
        self.k, self.draws, self.index = min(k, scan.rows.count), draws, index
        self._generator = torch.Generator(scan.rows.device).manual_seed(seed)

    def mean(self, x: Tensor, t: Tensor, own: Tensor) -> Tensor:  # noqa: ARG002
        """Near part and drawn part, merged."""
        ids = self._nearest(x, t)
        near = weigh(self.scan.rows, ids, x, t, budget=self.scan.memory, norms=self.scan.norms)
        drawn = _uniform(self.scan, (self.draws,), self._generator)
        known = _among(drawn, ids)
        log_mass, mean = _shared_sum(self.scan, drawn, x, t, leave_out=known)
        others = self.scan.rows.count - (ids >= 0).sum(1)
        scale = others / (self.draws - known.sum(1)).clamp_min(1)
        share = (log_mass + scale.log() - near.weighted.log_mass).sigmoid().float()
        return near.mean.lerp(mean, share[:, None])

    def _nearest(self, x: Tensor, t: Tensor) -> Int[Tensor, "B K"]:
        if self.index is None:
            return self.scan.logits(x, t).topk(self.k, dim=1).indices
        return self.index.candidates(x / t.clamp_min(_SEARCH_TIME)[:, None], self.k).ids.to(x.device)


class Snis(Baseline):
    """Self-normalised importance sampling from the neighbours (Niedoba et al. 2024, arXiv 2402.08018).

    Theirs: the k nearest images are found by exact search over all pixels; the proposal gives each of them
    its posterior weight, and every other image the weight of the k-th, an upper bound of its own. m draws
    with replacement, weighted by exp(l_i) / proposal, duplicates joined. k = 2,048 and m = 256 are the
    defaults of their released training code.

    Ours: one scan by bf16 halves in place of faiss' flat index and of the draws' own distances; the 32
    nearest by eq. 6, because at t = .99 a scan's logits part near-duplicates at random.
    """

    def __init__(self, scan: Scan, *, k: int, draws: int, seed: int) -> None:
        super().__init__(scan, needs_all=True)
        self.k, self.draws = min(k, scan.rows.count), draws
        self._generator = torch.Generator(scan.rows.device).manual_seed(seed)

    def mean(self, x: Tensor, t: Tensor, own: Tensor) -> Tensor:  # noqa: ARG002
        """Weighted mean of the images drawn."""
        logits = self.scan.logits(x, t)
        best, places = logits.topk(self.k, dim=1)
        logits.sub_(best[:, :1])
        heavy = places[:, :_WEIGHED]
        first = torch.zeros_like(heavy[:, 0])
        near = by_difference(self.scan.rows, heavy, x, t, first, budget=self.scan.memory)
        logits.scatter_(1, heavy, near)
        best = logits.gather(1, places)
        least = best.amin(1, keepdim=True)
        ids, counts = _distinct(self._draw(best, least, places))
        # The proposal is exp(l_i) for a neighbour, exp(l_k) for others, up to a factor of the query's own.
        weights = (counts.log() + (logits.gather(1, ids) - least).clamp_max_(0)).softmax(1)
        return _gathered_mean(self.scan, ids, weights)

    def _draw(
        self, best: Float[Tensor, "B K"], least: Float[Tensor, "B 1"], places: Int[Tensor, "B K"]
    ) -> Int[Tensor, "B M"]:
        """From the proposal, as a mixture: uniform over all n, or what the neighbours have beyond that."""
        top = best.amax(1, keepdim=True)
        everywhere = (least - top).exp()  # the weight of each image
        # never all zero, as they would be where the neighbours weigh the same
        beyond = ((best - top).exp() - everywhere).clamp_min(1e-30)
        chosen = torch.multinomial(beyond, self.draws, replacement=True, generator=self._generator)
        uniform = _uniform(self.scan, tuple(chosen.shape), self._generator)
        share = everywhere * self.scan.rows.count
        share = share / (share + beyond.sum(1, keepdim=True))
        coin = torch.rand(chosen.shape, generator=self._generator, device=share.device)
        return torch.where(coin < share, uniform, places.gather(1, chosen))


def _factors(t: Tensor) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """What multiplies x.x_i and |x_i|^2 in eq. 5."""
    time = t.double()
    inverse = (1 - time).square().reciprocal()
    return (time * inverse).float(), (-0.5 * time.square() * inverse).float()


def _split(a: Float[Tensor, "B K"]) -> tuple[Tensor, Tensor]:
    high = a.bfloat16()
    return high, (a - high.float()).bfloat16()


def _product(halves: tuple[Tensor, Tensor], b: Tensor) -> Float[Tensor, "B R"]:
    """(high + low) @ b in float32."""
    high, low = halves
    if b.device.type == "cuda":
        return torch.mm(high, b, out_dtype=torch.float32).add_(torch.mm(low, b, out_dtype=torch.float32))
    # On a CPU the result is rounded to bf16 (2^-9: useless as a logit), the sum inside is not: what the
    # rounding took off is a third product away.
    first = torch.mm(high, b)
    left = torch.addmm(torch.addmm(first, high, b, beta=-1), low, b)
    return first.float().add_(left)


def _uniform(scan: Scan, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(scan.rows.count, shape, generator=generator, device=scan.rows.device)


def _shared_sum(
    scan: Scan,
    ids: Int[Tensor, " M"],
    x: Float[Tensor, "B D"],
    t: Float[Tensor, " B"],
    *,
    leave_out: Bool[Tensor, "B M"] | None = None,
) -> tuple[Float[Tensor, " B"], Float[Tensor, "B D"]]:
    """Log-mass, float64, and mean of the same images for all queries, each leaving out some."""
    images = scan.images(ids)
    scale, offset = _factors(t)
    logits = torch.mm(x * scale[:, None], images.T).addr_(offset, images.square().sum(1))
    if leave_out is not None:
        logits.masked_fill_(leave_out, torch.finfo(logits.dtype).min)
    highest = logits.amax(1)
    weights = logits.sub_(highest[:, None]).clamp_min_(-80.0).exp_()
    mass = weights.sum(1)
    mean = weights.div_(mass[:, None]) @ images
    # what eq. 5 leaves out of every logit
    shared = -0.5 * x.double().square().sum(1) / (1 - t.double()).square()
    return highest.double() + mass.double().log() + shared, mean


def _among(drawn: Int[Tensor, " M"], ids: Int[Tensor, "B K"]) -> Bool[Tensor, "B M"]:
    """Which of the drawn images are among each query's own."""
    ordered = ids.sort(1).values
    wanted = drawn.expand(len(ids), -1).contiguous()
    places = torch.searchsorted(ordered, wanted).clamp_max_(ids.shape[1] - 1)
    return ordered.gather(1, places) == wanted


def _distinct(draws: Int[Tensor, "B M"]) -> tuple[Int[Tensor, "B K"], Float[Tensor, "B K"]]:
    """The different ids of each row, and how often each was drawn; filled up with one of them, 0 times."""
    ordered = draws.sort(1).values
    new = torch.ones_like(ordered)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    places = new.cumsum(1) - 1
    ids = ordered[:, :1].repeat(1, int(places.max()) + 1).scatter_(1, places, ordered)
    counts = torch.zeros(ids.shape, device=ids.device)
    return ids, counts.scatter_add_(1, places, torch.ones(places.shape, device=ids.device))


def _gathered_mean(
    scan: Scan, ids: Int[Tensor, "B K"], weights: Float[Tensor, "B K"]
) -> Float[Tensor, "B D"]:
    """Weighted means of each query's own images."""
    room = scan.memory // 2 if scan.rows.device.type == "cuda" else _CACHE_BYTES
    step = max(1, room // (4 * ids.shape[1] * scan.rows.dim))
    means = []
    for some, mine in zip(ids.split(step), weights.split(step), strict=True):
        images = scan.rows.gather(some.flatten()).view(*some.shape, -1).float()
        means.append(torch.bmm(mine[:, None], images)[:, 0])
    return scan.rows.codec.values_(torch.cat(means))
