"""The images that matter in pixels, all others by their leading coordinates: near field and far field.

A level scans images in r coordinates: one product gives their logits (eq. 9), the residual Gaussian the rest
(eq. 10). The best go on to the next level, at last to their pixels (`nearfield`); those left behind keep the
mass and the mean they had, and all of it merges by eq. 4 (docs/field.md, section 10). Where a ladder has a
sample, the first level scans those images alone, and what comes of them stands for all; or the first level
scans all, only to say which come first, and a sample stands for those it leaves behind.

Axes:  B queries   n images   K images passed on   r coordinates of a level   D = C*H*W
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor

from nnflow.coordinates import Coordinates
from nnflow.index import NeighbourIndex
from nnflow.ladder import Ladder
from nnflow.laidout import MOST_ROWS, Rows
from nnflow.memory import rows_within
from nnflow.nearfield import weigh
from nnflow.pixels import PixelRows
from nnflow.products import Buffer, Scores, masses, scores_of, weighted
from nnflow.residual import Residual
from nnflow.scan import AllImages
from nnflow.support import Part, Support
from nnflow.weighted import WeightedMean

# A candidate this far below the heaviest, exp(-20) = 2e-9 of the mass, and by so many standard deviations of
# what its coordinates leave open, is not read from the store.
_IRRELEVANT, _DEVIATIONS = 20.0, 6.0
_TOGETHER = 128  # queries of a scan: 256 in two halves take 144 ms, at once 197 (CIFAR-10, 512/100, 2 cores)
_WIDTHS = (2, 8, 32, 128, 512, 1024, 2048)  # candidates per query, rounded up to one of these
# Coordinates of their mean that are summed, or a quarter of those kept; of the others eq. 11 has the mean.
# With 128 of 512 the 99th percentile of the error rises from .36 to .46 % at t = .1 (CIFAR-10, 512/100), with
# 64 to .63 %; 256 would take 5 % longer. Of 1,024 (64 x 64, 1024/2000, t = .05) 128 leave .90 % (largest of
# 24 queries), 256 .79, 512 .74.
_SUMMED = 128
_FAINT = 9.0  # a rest of less than exp(-9) = 1.2e-4 of the mass: its mean is not summed, only estimated


@dataclass(frozen=True)
class _Queries:
    """Some queries in the coordinates."""

    x: Float[Tensor, "B D"]
    t: Float[Tensor, " B"]
    c: Float[Tensor, "B D"]  # x - t mean
    y: Float[Tensor, "B R"]  # P c
    outside: Float[Tensor, " B"]  # |c|^2 - |y|^2, float64


@dataclass(frozen=True)
class _Scanned:
    """The images of a scan: those summed over, or a sample of them.

    Attributes:
        coordinates: whose rows `images` are scanned.
        places: which stored image each of those rows is; None: as they are.
        total: images that they stand for.
    """

    coordinates: Coordinates
    images: slice
    places: Int[Tensor, " n"] | None
    total: int

    def __len__(self) -> int:
        return self.images.stop - self.images.start

    def ids(self, found: Int[Tensor, "B K"]) -> Int[Tensor, "B K"]:
        """The stored images that were found at these places of the scan."""
        return found + self.images.start if self.places is None else self.places[found]

    @property
    def log_share(self) -> float:
        """The logarithm of how many images each stands for."""
        return math.log(self.total / len(self))


@dataclass(frozen=True)
class _Level:
    """Images weighed by their first `rank` coordinates, and the best of them.

    Rows are those of all images, or each query's own; of the best so many as `kept` says go on.
    """

    rank: int
    rows: Rows | Int8[Tensor, "B m r"]
    scores: Scores
    best: Float[Tensor, "B K"]
    places: Int[Tensor, "B K"]
    kept: Int[Tensor, " B"]

    @property
    def passed(self) -> Bool[Tensor, "B K"]:
        """Which of the best go on."""
        return torch.arange(self.best.shape[1], device=self.kept.device) < self.kept[:, None]

    @property
    def last(self) -> Float[Tensor, " B"]:
        """The lowest logit of those: none left behind is above it."""
        return self.best.gather(1, self.kept[:, None] - 1)[:, 0]


@dataclass(frozen=True)
class _Rest:
    """What a level leaves behind: log-masses as of eq. 3, and the mean of its coordinates."""

    log_mass: Float[Tensor, " B"]
    log_square: Float[Tensor, " B"]
    mean: Float[Tensor, "B R"]


class NearAndFar(Support):
    """The sum taken up a ladder, its far field kept or, with `far` off, dropped."""

    _buffer = Buffer()  # of all ladders: a plan has several, and each may fill half of the budget

    def __init__(self, index: NeighbourIndex, rows: PixelRows, *, ladder: Ladder, budget: int) -> None:
        super().__init__(rows, budget=budget)
        self.index = index
        self.coordinates = index.coordinates.to(rows.device)
        self.ladder = self._fitted(ladder)
        self._every_coordinate = ladder.levels[0][0] >= rows.dim
        self._embedding = self.coordinates.embedding
        self._residual = Residual(self._embedding)
        self._all: AllImages | None = None
        # Worth a pass over the pixels where they fit in the cache of files; else of those gathered.
        small = rows.pixels.nbytes <= budget
        self._norms = rows.squared_norms(budget).float() if small else None

    def _fitted(self, ladder: Ladder) -> Ladder:
        """Its ranks rounded up to where the coordinates may be cut; of equal ones the last stays."""
        cuts = {self.coordinates.edge(rank): keep for rank, keep in ladder.levels}
        return replace(ladder, levels=tuple(cuts.items()))

    def without_far(self) -> "NearAndFar":
        """The same images in pixels, and nothing of the others."""
        if not self.ladder.far:
            return self
        ladder = replace(self.ladder, far=False, rest=None)
        return NearAndFar(self.index, self.rows, ladder=ladder, budget=self.budget)

    def reach(self, mean: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
        """Radius of the data about its mean, plus the way there."""
        return self._embedding.reach(mean)

    def part(
        self,
        x: Float[Tensor, "B D"],
        t: Float[Tensor, " B"],
        images: slice,
        keep: Int[Tensor, " B"] | None = None,
    ) -> Part:
        """Climbs the ladder; where that would read every image or coordinate, sums all images instead.

        Args:
            x: queries.
            t: their times.
            images: the stored images to sum over.
            keep: of each query, images read in pixels; at most, and by default, those of the last level.
        """
        if images.stop - images.start <= self.ladder.levels[-1][1] or self._every_coordinate:
            self._all = self._all or AllImages(self.rows, budget=self.budget)
            return self._all.part(x, t, images)
        ladder = self._ladder_for(images)
        scanned = self._scanned(images, ladder.sample)
        count, steps = len(scanned) + (ladder.rest or 0), pairwise(ladder.levels)
        passed = sum(keep * rank for (_, keep), (rank, _) in steps)
        # A level's rows of bytes, once more for those whose mean is summed; the logits and their maxima, and
        # of a block the products they are made of.
        per_query = 5 * count + 16 * min(count, MOST_ROWS) + 2 * passed + 24 * self.rows.dim
        most = min(len(x), _TOGETHER) if x.device.type == "cpu" else len(x)
        chunk = rows_within(self.budget, per_query, at_most=most, what="logits", share=2)
        places = torch.arange(len(x), device=x.device).split(chunk)
        keep = torch.full_like(t, self.ladder.levels[-1][1], dtype=torch.int64) if keep is None else keep
        parts = [self._climb(x[some], t[some], scanned, ladder, keep[some]) for some in places]
        found, kept = parts[0] if len(parts) == 1 else Part.joined(parts, places), keep.tolist()
        names = {number: ladder.named(number) for number in set(kept)}
        return replace(found, ladders=tuple(names[number] for number in kept))

    def _ladder_for(self, images: slice) -> Ladder:
        """The ladder, without its sample of a class, and where that would not fit in memory."""
        drawn, total = self.ladder.drawn, images.stop - images.start
        if drawn is None:
            return self.ladder
        fits = drawn < total == len(self.coordinates.rows) and drawn * self.coordinates.rank <= self.budget
        return self.ladder if fits else replace(self.ladder, sample=None, rest=None)

    def _scanned(self, images: slice, sample: int | None) -> _Scanned:
        """Some images, or a sample of all."""
        total = images.stop - images.start
        if sample is None:
            return _Scanned(self.coordinates, images, None, total)
        drawn = self.coordinates.sample(sample)
        return _Scanned(drawn.coordinates, slice(0, sample), drawn.places, total)

    def _climb(
        self, x: Tensor, t: Tensor, scanned: _Scanned, ladder: Ladder, last: Int[Tensor, " B"]
    ) -> Part:
        queries = self._coordinates_of(x, t)
        levels, ids = [], None
        for rank, keep in ladder.levels:
            kept = last if rank == ladder.levels[-1][0] else torch.full_like(last, keep)
            fine = ladder.far and (ids is not None or ladder.rest is None)
            level = self._level(queries, scanned if ids is None else ids, rank, kept, fine=fine)
            levels.append(level)
            ids = scanned.ids(level.places) if ids is None else ids.gather(1, level.places)
        assert ids is not None
        near, ids = self._near(queries, ids, levels[-1])
        if not ladder.far:
            tails = [self._log_tail(queries, level) for level in levels]
            tails.append(self._log_most(queries, scanned.total - len(scanned)))
            return Part.summed(near, str(ladder), ids=ids, log_tail=torch.stack(tails, 1).logsumexp(1))
        first, *later = levels
        rests = [self._rest(queries, level, near) for level in later]
        if ladder.rest is None:
            rests.append(self._rest(queries, first, near))
        else:
            rests.append(self._stand_ins(queries, first, self._scanned(scanned.images, ladder.rest), near))
        far = self._far(queries, rests)
        found, share = near.merge(far), scanned.log_share
        every = WeightedMean(found.log_mass + share, found.log_square + share, found.mean)
        log_far = far.log_mass if share == 0 else _log_less(every.log_mass, near.log_mass)
        return Part.summed(every, str(ladder), ids=ids, log_far=log_far)

    def _coordinates_of(self, x: Tensor, t: Tensor) -> _Queries:
        c = x - t[:, None] * self._embedding.mean
        kept = self.coordinates.rank if self.ladder.far else self.ladder.levels[-1][0]
        y = c @ self._embedding.principal[:kept].T
        outside = c.square().sum(1).double() - y.square().sum(1).double()
        return _Queries(x, t, c, y, outside.clamp_min(0))

    def _level(
        self, queries: _Queries, images: _Scanned | Tensor, rank: int, kept: Int[Tensor, " B"], *, fine: bool
    ) -> _Level:
        """Those of a scan, or ids that a level passed on, by their first `rank` coordinates (eq. 9).

        They are to be summed if `fine`; otherwise only the best are wanted.
        """
        rows: Rows | Tensor
        if isinstance(images, _Scanned):
            rows = images.coordinates.scanned(images.images, self.budget)
            squares = images.coordinates.squares(rank)[images.images]
        else:
            picked = self.coordinates.rows[:, :rank].index_select(0, images.flatten())
            rows, squares = picked.view(*images.shape, rank), self.coordinates.squares(rank)[images]
        row, fall = self.coordinates.query(queries.y[:, :rank], queries.t)
        scores = scores_of(row, fall, rows, squares, self._buffer, fine=fine)
        kept = kept.clamp_max(scores.count)
        best, places = scores.highest(int(kept.max()))
        return _Level(rank, rows, scores, best, places, kept)

    def _rest(self, queries: _Queries, level: _Level, near: WeightedMean) -> _Rest:
        """Mass and mean coordinates of the images a level leaves behind; overwrites its scores."""
        level.scores.leave_out(level.places, level.passed)
        return self._summed(queries, level, level.last, near)

    def _stand_ins(self, queries: _Queries, first: _Level, scanned: _Scanned, near: WeightedMean) -> _Rest:
        """What a sample, weighed as the first level weighs, says of the images that it leaves behind.

        Drawn ones that it passes on are taken out; each of the others stands for as many that it does not.
        """
        level = self._level(queries, scanned, first.rank, torch.ones_like(first.kept), fine=True)
        assert scanned.places is not None
        at = torch.searchsorted(scanned.places, first.places).clamp_max(len(scanned) - 1)
        passed = first.passed & (scanned.places[at] == first.places)
        level.scores.leave_out(at, passed)
        left = (scanned.total - first.kept).double() / (len(scanned) - passed.sum(1))
        rest = self._summed(queries, level, level.scores.largest(), near)
        return _Rest(rest.log_mass + left.log(), rest.log_square + left.log(), rest.mean)

    def _summed(
        self, queries: _Queries, level: _Level, top: Float[Tensor, " B"], near: WeightedMean
    ) -> _Rest:
        """Mass and mean coordinates of a level's images; none has a score above `top`.

        Where they hold next to nothing of the mass, their mean is that of the Gaussian of all images (eq.
        11), and so it is beyond the first coordinates.
        """
        scores, rank = level.scores, level.rank
        noise = (1 - queries.t.double()).square()
        constant = self._residual.log_mass(queries.y, queries.outside, queries.t, rank)
        constant -= 0.5 * queries.y[:, :rank].double().square().sum(1) / noise
        mean = self._residual.coordinates(queries.y, queries.t)
        matters = constant + scores.log_bound(top) > near.log_mass - _FAINT
        log_mass, log_square = torch.empty_like(constant), torch.empty_like(constant)
        some, others = matters.nonzero()[:, 0], (~matters).nonzero()[:, 0]
        summed = min(rank, max(_SUMMED, self.coordinates.rank // 4))
        left = weighted(scores, top, level.rows, some, summed, self._buffer)
        log_mass[some], log_square[some] = left.log_mass, left.log_square
        mean[some, : left.mean.shape[1]] = self.coordinates.values(left.mean)
        log_mass[others], log_square[others] = masses(scores, top, others)
        return _Rest(constant + log_mass, 2 * constant + log_square, mean)

    def _spread(self, queries: _Queries, rank: int) -> Float[Tensor, " B"]:
        """Standard deviation of what the first `rank` coordinates leave open of a logit."""
        left = queries.outside + queries.y[:, rank:].double().square().sum(1)
        return self._residual.spread(left, queries.t, rank)

    def _log_tail(self, queries: _Queries, level: _Level) -> Float[Tensor, " B"]:
        """Bound on the log-mass of those left behind, each the largest that the best allow.

        As eq. 8, without a bound for the coordinates beyond the first r. What the query's digits and
        float32 round away is added; and no image is further from its bytes than `rounding`.
        """
        rank, last = level.rank, level.last
        left = level.scores.count - level.kept
        time, reach = queries.t.double(), self._embedding.radius + self.coordinates.rounding(rank)
        noise = (1 - time).square()
        size = queries.y[:, :rank].double().norm(dim=1)
        slack = 0.5 * level.scores.unit.double() * self.coordinates.widest(rank)
        slack += 2**-20 * (time / noise * reach * (size + time * reach) + last.double().abs())
        nearest = (-2 * noise * (last.double() + slack) + size.square()).clamp_min(0).sqrt()
        nearest = (nearest - time * self.coordinates.rounding(rank)).clamp_min(0)
        by_order = -0.5 * nearest.square() / noise + left.double().log()
        return torch.minimum(by_order, self._log_most(queries, left))

    def _log_most(self, queries: _Queries, count: Tensor | int) -> Float[Tensor, " B"]:
        """Bound on the log-mass of `count` images of which nothing is known but the data's radius."""
        time = queries.t.double()
        ball = (queries.c.double().norm(dim=1) - time * self._embedding.radius).clamp_min(0)
        return -0.5 * (ball / (1 - time)).square() + torch.as_tensor(count).to(ball).log()

    def _far(self, queries: _Queries, rests: list[_Rest]) -> WeightedMean:
        """All levels' rests as one part: their coordinates are mixed, then made an image once."""
        log_masses = torch.stack([rest.log_mass for rest in rests], 1)
        log_mass = log_masses.logsumexp(1)
        shares = log_masses.softmax(1).nan_to_num(0).float()
        mixed = torch.zeros_like(rests[0].mean)
        for share, rest in zip(shares.T, rests, strict=True):
            mixed += share[:, None] * rest.mean
        return WeightedMean(
            log_mass,
            torch.stack([rest.log_square for rest in rests], 1).logsumexp(1),
            self._residual.mean(mixed, queries.c, queries.y, queries.t),
        )

    def _near(self, queries: _Queries, ids: Tensor, level: _Level) -> tuple[WeightedMean, Int[Tensor, "B K"]]:
        """The candidates in pixels; those without weight are not read, and their ids become -1."""
        top = level.best
        margin = _IRRELEVANT + _DEVIATIONS * self._spread(queries, level.rank)
        needed = (top.double() >= top[:, :1].double() - margin[:, None]).sum(1)
        needed = torch.minimum(needed, level.kept)
        ids = ids.masked_fill(torch.arange(ids.shape[1], device=ids.device) >= needed[:, None], -1)
        parts, rows, least = [], [], 0
        for width in sorted({min(width, ids.shape[1]) for width in (*_WIDTHS, ids.shape[1])}):
            some = ((needed > least) & (needed <= width)).nonzero()[:, 0]
            least = width
            if len(some):
                near = weigh(
                    self.rows,
                    ids[some, :width],
                    queries.x[some],
                    queries.t[some],
                    budget=self.budget // 4,
                    norms=self._norms,
                )
                parts.append(near.weighted)
                rows.append(some)
        order = torch.cat(rows).argsort()
        return WeightedMean(
            torch.cat([part.log_mass for part in parts])[order],
            torch.cat([part.log_square for part in parts])[order],
            torch.cat([part.mean for part in parts])[order],
        ), ids


def _log_less(every: Float[Tensor, " B"], some: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """The logarithm of a mass of which that of `some` is taken."""
    return every + torch.log1p(-(some - every).exp())
