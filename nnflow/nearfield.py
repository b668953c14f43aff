"""The k nearest images of a query, their logits, and a certificate for the others.

Logits come from the expansion (docs/field.md, eq. 5), one product with the gathered images, and where
that is not enough by difference from an anchor a, with delta_i = x_i - x_a and residual r = x - t x_a:

    l_i - l_a = t (delta_i . r - t |delta_i|^2 / 2) / (1-t)^2          (docs/field.md, eq. 6)

Near-duplicates have small delta_i, so their logits lose nothing where it matters: at t = .99 in
float32 the expansion moves a weight by 0.40, the difference by 7e-5 (docs/field.md, section 4).

Axes:  B queries   K candidates   D = C*H*W values of one image
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nnflow.errors import InputError
from nnflow.index import NeighbourIndex
from nnflow.pixels import PixelRows
from nnflow.support import Part, Support
from nnflow.weighted import WeightedMean

# Of images gathered at once, for each thread: 341 of 3,072 values. As many queries as threads, or a multiple,
# so that a core weighs what it has gathered: of 500 images each one query takes 0.45 to 0.6 ms, in some
# processes 2.3; two together 0.25 to 0.4 each, four 0.5 to 0.9. Of 100 images each six take 0.09 ms, sixteen
# 0.17 (2 cores with 1 MB of cache each).
_CACHE_BYTES = 1 << 22
# Up to this factor t / (1-t)^2 (t = .3) the expansion weighs k neighbours: it leaves 8e-5 of relative error
# in the velocity at t = .15 on CIFAR-10, where leaving out all but 100 leaves 4e-2. Beyond, images that
# compete are weighed by difference. Competing: within exp(-40), and within the expansion's error, see
# `competing_margin`.
_PLAIN_GAIN = 0.6
_COMPETING = 40.0
# Query times below this are searched as if at it: x / t grows without bound, and there the order of
# the candidates says little (all but 6 % of 50,000 images matter at t = .01).
_SEARCH_TIME = 0.01


@dataclass(frozen=True)
class Near:
    """K weighed images for each query.

    Attributes:
        logits: relative to the anchor's, whose own is 0; -inf for an id of -1.
        anchor: place of the anchor among the K.
        offset: the anchor's own logit -|x - t x_a|^2 / (2 (1-t)^2), float64.
        mean: soft-max mean of the K images.
    """

    logits: Float[Tensor, "B K"]
    anchor: Int[Tensor, " B"]
    offset: Float[Tensor, " B"]
    mean: Float[Tensor, "B D"]

    @property
    def weighted(self) -> WeightedMean:
        """The K images as one part of the sum."""
        logits = self.logits.double()
        return WeightedMean(
            self.offset + logits.logsumexp(1),
            2 * self.offset + (2 * logits).logsumexp(1),
            self.mean,
        )


def weigh(
    rows: PixelRows,
    ids: Int[Tensor, "B K"],
    x: Float[Tensor, "B D"],
    t: Float[Tensor, " B"],
    *,
    budget: int,
    norms: Float[Tensor, " n"] | None = None,
    plain_gain: float = _PLAIN_GAIN,
) -> Near:
    """Logits and soft-max mean of the images `ids`; -1 stands for none.

    Args:
        rows: the stored pixels.
        ids: images to weigh for each query.
        x: queries.
        t: their times.
        budget: working memory in bytes.
        norms: |x_i|^2 of all images where the caller has them; of those gathered otherwise.
        plain_gain: up to which t / (1-t)^2 the expansion will do.
    """
    gain = t.double() / (1 - t.double()).square()
    if bool((gain <= plain_gain).all()):
        logits, anchor, mean = _at_once(rows, ids, x, t, budget, norms)
        return Near(logits, anchor, _offset(rows, ids, anchor, x, t)[0], mean)
    logits, anchor = _by_expansion(rows, ids, x, t, budget, norms)
    contested = (logits > -competing_margin(rows, x, t)[:, None]).sum(1) > 1
    hard = (contested & (gain > plain_gain)).nonzero()[:, 0]
    if len(hard):
        logits[hard] = by_difference(rows, ids[hard], x[hard], t[hard], anchor[hard], budget=budget)
    offset, mean = _offset(rows, ids, anchor, x, t)
    weights = _weights(logits - logits.amax(1, keepdim=True))  # by difference another may outweigh the anchor
    weights /= weights.sum(1, keepdim=True)
    mixed = (weights.gather(1, anchor[:, None])[:, 0] < 1).nonzero()[:, 0]  # elsewhere the anchor is the mean
    if len(mixed):
        mean[mixed] = _means(rows, ids[mixed], weights[mixed], budget)
    return Near(logits, anchor, offset, mean)


def _weights(logits: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """Weights of logits relative to the largest: at least exp(-80), also of an id of -1: 1e-35 an image.

    Lower ones are denormal, and with those 128 queries at t ~ U[0, 1] take 27 ms for 10 (CIFAR-10).
    """
    return logits.clamp_min(-80.0).exp_()


def _offset(rows: PixelRows, ids: Tensor, anchor: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The anchors' own logits (eq. 3), float64, and the anchors."""
    image = rows.values(ids.gather(1, anchor[:, None])[:, 0])
    residual = (x - t[:, None] * image).square().sum(1, dtype=torch.float64)
    return -0.5 * residual / (1 - t.double()).square(), image


def _at_once(
    rows: PixelRows, ids: Tensor, x: Tensor, t: Tensor, budget: int, norms: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 5 where it is enough: logits, anchors and means, each image read once."""
    query = x if norms is not None else _from_offset(rows, x, t)
    unit = rows.codec.unit
    logits = x.new_empty(ids.shape, dtype=torch.float64)
    mean = _Running(x)
    for here, some, images in _gathered(rows, ids, budget):
        known = ids[here, some]
        products = torch.bmm(query[here, None], images.transpose(1, 2))[:, 0].double() / unit
        if norms is not None:
            squares = norms[known.clamp_min(0)].double()
        else:
            squares = torch.linalg.vector_norm(images, dim=2).double().square() / unit**2
        logits[here, some] = _expanded(products, squares, known, t[here])
        mean.add(here, logits[here, some], images)
    relative, anchor = _relative(logits)
    return relative, anchor, rows.codec.values_(mean.taken())


class _Running:
    """Soft-max means of images that come a few at a time: relative to the heaviest so far, as is the mass."""

    def __init__(self, like: Float[Tensor, "B D"]) -> None:
        self._total = torch.zeros_like(like)
        self._mass = like.new_zeros(len(like))
        self._highest = torch.full_like(self._mass, torch.finfo(torch.float64).min, dtype=torch.float64)

    def add(self, here: slice, logits: Float[Tensor, "b K"], images: Float[Tensor, "b K D"]) -> None:
        """More images of the queries `here`."""
        top = torch.maximum(self._highest[here], logits.amax(1))
        faded = (self._highest[here] - top).exp().float()
        weights = _weights((logits - top[:, None]).float())
        total = self._total[here].mul_(faded[:, None])[:, None]
        torch.baddbmm(total, weights[:, None], images, out=total)
        self._mass[here] = self._mass[here] * faded + weights.sum(1)
        self._highest[here] = top

    def taken(self) -> Float[Tensor, "B D"]:
        """The means, for which the sums are given up."""
        return self._total.div_(self._mass[:, None])


def _from_offset(rows: PixelRows, x: Tensor, t: Tensor) -> Float[Tensor, "B D"]:
    """A query as seen from a stored 0.

    p_i . this - t |p_i|^2 / 2, p in units, is x.x_i - t |x_i|^2 / 2 but for what all images share.
    """
    return x - rows.codec.offset * t[:, None]


def competing_margin(rows: PixelRows, x: Float[Tensor, "B D"], t: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Logits below the largest by more than this belong to images that do not compete.

    The expansion adds D products of p with x - t offset and D squares of p, in float32: its error is at
    most about D half-ulps of the sum of their sizes, times the gain. A constant fails above 32 x 32: at
    64 x 64 two images of one differing pixel got weights 1 and 0 for 1/2 and 1/2.
    """
    gain = t.double() / (1 - t.double()).square()
    size = rows.longest * torch.linalg.vector_norm(_from_offset(rows, x, t), dim=1).double()
    return _COMPETING + gain * (size + 0.5 * t.double() * rows.longest**2) * rows.dim * 2**-28


def _by_expansion(
    rows: PixelRows, ids: Tensor, x: Tensor, t: Tensor, budget: int, norms: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Eq. 5: logits relative to the heaviest image, and its place: the anchor."""
    if norms is None:
        products, squares = _products(rows, ids, _from_offset(rows, x, t), budget)
    else:
        products, squares = _products(rows, ids, x, budget, squares=norms[ids.clamp_min(0)].double())
    return _relative(_expanded(products, squares, ids, t))


def _expanded(products: Tensor, squares: Tensor, ids: Tensor, t: Tensor) -> Float[Tensor, "B K"]:
    """Eq. 5, float64."""
    time = t.double()
    gain = time / (1 - time).square()
    logits = gain[:, None] * (products - 0.5 * time[:, None] * squares)
    return logits.masked_fill_(ids < 0, -torch.inf)


def _relative(logits: Float[Tensor, "B K"]) -> tuple[Float[Tensor, "B K"], Int[Tensor, " B"]]:
    """Logits less the largest, float32, and its place."""
    highest, anchor = logits.max(1)
    return (logits - highest[:, None]).float(), anchor


def by_difference(
    rows: PixelRows,
    ids: Int[Tensor, "B K"],
    x: Float[Tensor, "B D"],
    t: Float[Tensor, " B"],
    anchor: Int[Tensor, " B"],
    *,
    budget: int,
) -> Float[Tensor, "B K"]:
    """Eq. 6: logits of the images `ids` relative to that at place `anchor` among them."""
    time = t.double()
    first = rows.gather(ids.gather(1, anchor[:, None])[:, 0]).float()
    residual = x - t[:, None] * rows.codec.values(first)
    along, squares = _products(rows, ids, residual, budget, origin=first)
    gain = time / (1 - time).square()
    logits = gain[:, None] * (along - 0.5 * time[:, None] * squares)
    return logits.masked_fill_(ids < 0, -torch.inf).float()


def _products(
    rows: PixelRows,
    ids: Tensor,
    x: Tensor,
    budget: int,
    *,
    squares: Tensor | None = None,
    origin: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(p_i - o) . x and, unless given, |p_i - o|^2 of the images `ids`, p in units, float64 (B, K)."""
    products, norms = x.new_empty(ids.shape), x.new_empty(ids.shape)
    for here, some, images in _gathered(rows, ids, budget):
        if origin is not None:
            images.sub_(origin[here, None])  # exact for bytes, for floats to an ulp of each difference
        # So turned, and not as (b, K, D) by (b, D, 1), 16 queries of 8 images take 24 us for 310.
        torch.bmm(x[here, None], images.transpose(1, 2), out=products[here, None, some])
        if squares is None:
            torch.linalg.vector_norm(images, dim=2, out=norms[here, some])
    if squares is None:
        squares = norms.double().square() / rows.codec.unit**2
    return products.double() / rows.codec.unit, squares


def _means(rows: PixelRows, ids: Tensor, weights: Tensor, budget: int) -> Float[Tensor, "B D"]:
    """Weighted means of the images `ids`."""
    mean = weights.new_zeros(len(ids), rows.dim)
    for here, some, images in _gathered(rows, ids, budget):
        torch.baddbmm(mean[here, None], weights[here, None, some], images, out=mean[here, None])
    return rows.codec.values_(mean)


def _gathered(rows: PixelRows, ids: Tensor, budget: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Chunks of queries, places among the K, and those images: take what you need at once.

    They are float32 (b, k, D) in one buffer: all K of several queries, or a few of each thread's.
    """
    fit, together = max(1, budget // (4 * rows.dim)), 1
    if rows.device.type == "cpu":
        together = max(1, min(torch.get_num_threads(), len(ids), fit))
        fit = min(fit, max(together, together * _CACHE_BYTES // (4 * rows.dim)))
    most = fit // together
    width = max(1, min(most, -(-ids.shape[1] // max(1, -(-ids.shape[1] // most)))))  # of turns alike
    chunk = max(1, min(fit // width // together * together, len(ids)))
    buffer = torch.empty(chunk * width, rows.dim, device=rows.device)
    known = ids.clamp_min(0)
    for start in range(0, len(ids), chunk):
        here = slice(start, min(start + chunk, len(ids)))
        for first in range(0, ids.shape[1], width):
            some = slice(first, min(first + width, ids.shape[1]))
            wanted = known[here, some]
            images = buffer[: wanted.numel()].copy_(rows.gather(wanted.flatten()))
            yield here, some, images.view(*wanted.shape, rows.dim)


class NearestImages(Support):
    """The sum over the k nearest images that an index finds, and nothing else.

    Args:
        index: what is asked.
        rows: the stored pixels.
        k: images.
        lists: how many of an index's inverted lists are looked into; None: as many as were measured to be
            enough from t = .3 on.
        budget: working memory in bytes.
    """

    def __init__(
        self, index: NeighbourIndex, rows: PixelRows, *, k: int, budget: int, lists: int | None = None
    ) -> None:
        super().__init__(rows, budget=budget)
        self.index = index
        self.k, self.lists = k, lists
        self._name = f"index/{k}" if lists is None else f"index/{k} in {lists} lists"
        self._embedding = index.embedding.to(rows.device)
        # 10.2 ms with them for 12.0 without (128 queries, CIFAR-10); the pass over all pixels takes 0.1 s.
        small = rows.pixels.nbytes <= budget
        self._norms = rows.squared_norms(budget).float() if small else None

    def part(self, x: Float[Tensor, "B D"], t: Float[Tensor, " B"], images: slice) -> Part:
        """Weighs the k candidates; bounds the rest where the index is exact."""
        ids, beyond = self._search(x, t, images)
        lost = int((ids < 0).all(1).sum())
        if lost:
            raise InputError(
                f"the index found no image at all for {lost} of {len(x)} queries; build it with kind "
                "flat, or ivf with fewer lists"
            )
        near = weigh(self.rows, ids, x, t, budget=self.budget, norms=self._norms)
        tail = self._log_tail(x, t, beyond, ids, images)
        return Part.summed(near.weighted, self._name, ids=ids, log_tail=tail)

    def reach(self, mean: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
        """Radius of the data about its mean, plus the way there."""
        return self._embedding.reach(mean)

    def _search(self, x: Tensor, t: Tensor, images: slice) -> tuple[Tensor, Tensor]:
        whole = images.start == 0 and images.stop == self.rows.count
        queries = x / t.clamp_min(_SEARCH_TIME)[:, None]
        found = self.index.candidates(queries, self.k, None if whole else images, lists=self.lists)
        empty = (found.ids < 0).all(1).nonzero()[:, 0]
        if self.lists is not None and len(empty):  # few lists may hold nothing
            found.ids[empty] = self.index.candidates(queries[empty], self.k).ids
        return found.ids.to(x.device), found.beyond.to(x.device)

    def _log_tail(
        self, x: Tensor, t: Tensor, beyond: Tensor, ids: Tensor, images: slice
    ) -> Float[Tensor, " B"]:
        """Log of (n - k) times the largest mass an image left out can have (docs/field.md, eq. 8)."""
        left_out = images.stop - images.start - (ids >= 0).sum(1)
        if not self.index.exact:
            return torch.where(left_out == 0, -torch.inf, torch.inf).double()
        time = t.double()
        # |x - t x_i| >= t |q - x_i| with q = x / t; within the coordinates no image left out is nearer
        # than `beyond`, outside them none is nearer than the query's own part less the data's radius.
        inside = time.square() * beyond.clamp_min(0)
        centred = x - t[:, None] * self._embedding.mean
        if self._embedding.directions is not None:
            centred -= (centred @ self._embedding.directions.T) @ self._embedding.directions
            reach = self._embedding.residual_radius
            outside = (centred.double().norm(dim=1) - time * reach).clamp_min(0).square()
        else:
            outside = torch.zeros_like(inside)
        # Where the search time was not the query's, only the ball that holds all images is known.
        ball = (x - t[:, None] * self._embedding.mean).double().norm(dim=1)
        ball = (ball - time * self._embedding.radius).clamp_min(0).square()
        nearest = torch.where(t < _SEARCH_TIME, ball, torch.maximum(inside + outside, ball))
        return left_out.double().log() - 0.5 * nearest / (1 - time).square()
