"""The images that matter in pixels, all others by their leading coordinates: near field and far field.

A level scans images in r coordinates: one product gives their logits (eq. 9), the residual Gaussian the rest
(eq. 10). The best go on to the next level, at last to their pixels (`nearfield`); those left behind keep the
mass and the mean they had, and all of it merges by eq. 4 (docs/field.md, section 10).

Axes:  B queries   n images   K images passed on   r coordinates of a level   D = C*H*W
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nnflow.coordinates import bfloat16_is_fast
from nnflow.index import NeighbourIndex
from nnflow.ladder import Ladder
from nnflow.memory import rows_within
from nnflow.nearfield import weigh
from nnflow.pixels import PixelRows
from nnflow.products import Buffer, Scores, scores_of, weighted
from nnflow.residual import Residual
from nnflow.scan import AllImages
from nnflow.support import Part, Support
from nnflow.weighted import WeightedMean

_SMALL = 64.0  # bfloat16 is spaced by 1/4 there; a path's own image lies within 16 of 0 at rank 512
# A candidate this far below the heaviest, exp(-20) = 2e-9 of the mass, and by so many standard deviations of
# what its coordinates leave open, is not read from the store.
_IRRELEVANT, _DEVIATIONS = 20.0, 6.0
_WIDTHS = (2, 8, 32, 128, 512)  # candidates per query, rounded up to one of these


@dataclass(frozen=True)
class _Queries:
    """Some queries in the coordinates."""

    x: Float[Tensor, "B D"]
    t: Float[Tensor, " B"]
    c: Float[Tensor, "B D"]  # x - t mean
    y: Float[Tensor, "B R"]  # P c
    outside: Float[Tensor, " B"]  # |c|^2 - |y|^2, float64


@dataclass(frozen=True)
class _Rest:
    """What a level leaves behind: log-masses as of eq. 3, and the mean of its coordinates."""

    log_mass: Float[Tensor, " B"]
    log_square: Float[Tensor, " B"]
    mean: Float[Tensor, "B r"]


class NearAndFar(Support):
    """The sum taken up a ladder, its far field kept or, with `far` off, dropped."""

    def __init__(self, index: NeighbourIndex, rows: PixelRows, *, ladder: Ladder, budget: int) -> None:
        super().__init__(rows, budget=budget)
        self.index = index
        self.coordinates = index.coordinates.to(rows.device)
        self.ladder = self._fitted(ladder)
        self._every_coordinate = ladder.levels[0][0] >= rows.dim
        self._embedding = self.coordinates.embedding
        self._residual = Residual(self._embedding)
        self._all: AllImages | None = None
        self._buffer = Buffer()
        # Worth a pass over the pixels where they fit in the cache of files; else of those gathered.
        small = rows.pixels.nbytes <= budget
        self._norms = rows.squared_norms(budget).float() if small else None

    def _fitted(self, ladder: Ladder) -> Ladder:
        """Its ranks rounded up to where the coordinates may be cut; of equal ones the last stays."""
        cuts = {self.coordinates.edge(rank): keep for rank, keep in ladder.levels}
        return Ladder(tuple(cuts.items()), ladder.far)

    def without_far(self) -> "NearAndFar":
        """The same images in pixels, and nothing of the others."""
        if not self.ladder.far:
            return self
        return NearAndFar(
            self.index, self.rows, ladder=Ladder(self.ladder.levels, far=False), budget=self.budget
        )

    def reach(self, mean: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
        """Radius of the data about its mean, plus the way there."""
        return self._embedding.reach(mean)

    def part(self, x: Float[Tensor, "B D"], t: Float[Tensor, " B"], images: slice) -> Part:
        """Climbs the ladder; where that would read every image or coordinate, sums all images instead."""
        count = images.stop - images.start
        if count <= self.ladder.levels[-1][1] or self._every_coordinate:
            self._all = self._all or AllImages(self.rows, budget=self.budget)
            return self._all.part(x, t, images)
        steps = pairwise(self.ladder.levels)
        passed = sum(keep * self.coordinates.width(rank) for (_, keep), (rank, _) in steps)
        logit = 2 if bfloat16_is_fast(x.device.type) else 4
        per_query = (logit + 1) * count + 4 * passed + 24 * self.rows.dim
        chunk = rows_within(self.budget, per_query, at_most=len(x), what="logits", share=2)
        places = torch.arange(len(x), device=x.device).split(chunk)
        return Part.joined([self._climb(x[some], t[some], images) for some in places], places)

    def _climb(self, x: Tensor, t: Tensor, images: slice) -> Part:
        queries = self._coordinates_of(x, t)
        ids, rests, tails, top = None, [], [], None
        for rank, keep in self.ladder.levels:
            rows = self._gathered(ids, images, self.coordinates.width(rank))
            shift = self._shift(queries, rank)
            scores, top, places = self._best(queries, rows, shift, rank, keep)
            if self.ladder.far:
                rests.append(self._rest(queries, scores, places, rows, shift, rank))
            else:
                left = scores.shape[1] - top.shape[1]
                tails.append(self._log_tail(queries, shift + top[:, -1].double(), top[:, -1], left, rank))
            ids = places + images.start if ids is None else ids.gather(1, places)
        assert ids is not None
        assert top is not None
        near, ids = self._near(queries, ids, top, rank)
        if not self.ladder.far:
            tail = torch.stack(tails, 1).logsumexp(1)
            return Part.summed(near, str(self.ladder), ids=ids, log_tail=tail)
        far = self._far(queries, rests)
        return Part.summed(near.merge(far), str(self.ladder), ids=ids, log_far=far.log_mass)

    def _coordinates_of(self, x: Tensor, t: Tensor) -> _Queries:
        c = x - t[:, None] * self._embedding.mean
        kept = self.coordinates.rank if self.ladder.far else self.ladder.levels[-1][0]
        y = c @ self._embedding.principal[:kept].T
        outside = c.square().sum(1).double() - y.square().sum(1).double()
        return _Queries(x, t, c, y, outside.clamp_min(0))

    def _shift(self, queries: _Queries, rank: int) -> Float[Tensor, " B"]:
        """About the largest logit: that of the image on whose path the query would lie."""
        noise = (1 - queries.t.double()).square()
        own = 0.5 * queries.y[:, :rank].double().square().sum(1) / noise
        return (own - 0.5 * rank).clamp_min(0)

    def _gathered(self, ids: Tensor | None, images: slice, width: int) -> Tensor:
        """Rows of the coordinates: of all images (n, a), or of those a level passed on (B, K, a)."""
        if ids is None:
            return self.coordinates.rows[images, :width]
        picked = self.coordinates.rows[:, :width].index_select(0, ids.flatten())
        return picked.view(*ids.shape, width)

    def _best(
        self, queries: _Queries, rows: Tensor, shift: Tensor, rank: int, keep: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits in the first `rank` coordinates (eq. 9) less `shift`, the best of them, their places.

        A query off the path of every stored image is asked again, and its shift changed in place: its
        largest logit is then no small number, and of large ones the leading 8 bits say little.
        """
        scores = self._scores(queries, rows, shift, rank, self._buffer)
        keep = min(keep, scores.values.shape[1])
        top, places = scores.highest(keep)
        off = (top[:, 0].float().abs() > _SMALL).nonzero()[:, 0]
        if len(off):
            shift[off] += top[off, 0].double()
            some = _Queries(*(value[off] for value in vars(queries).values()))
            theirs = rows[off] if rows.ndim == 3 else rows
            again = self._scores(some, theirs, shift[off], rank, Buffer())
            scores.values[off] = again.values
            top[off], places[off] = again.highest(keep)
        return scores.values, top, places

    def _scores(self, queries: _Queries, rows: Tensor, shift: Tensor, rank: int, buffer: Buffer) -> Scores:
        row = self.coordinates.query(queries.y[:, :rank].contiguous(), queries.t, shift)
        return scores_of(row, rows, buffer)

    def _rest(
        self, queries: _Queries, scores: Tensor, passed: Tensor, rows: Tensor, shift: Tensor, rank: int
    ) -> _Rest:
        """Mass and mean coordinates of the images a level leaves behind; overwrites `scores`."""
        rowwise = torch.arange(len(scores), device=scores.device)[:, None] * scores.shape[1]
        scores.view(-1).index_fill_(0, (passed + rowwise).flatten(), -torch.inf)  # scatter_ copies them all
        top = scores.amax(1).float()
        left = weighted(scores, top, rows)
        noise = (1 - queries.t.double()).square()
        constant = shift + top.double() - 0.5 * queries.y[:, :rank].double().square().sum(1) / noise
        constant += self._residual.log_mass(queries.y, queries.outside, queries.t, rank)
        return _Rest(
            constant + left.log_mass,
            2 * constant + left.log_square,
            self.coordinates.values(left.mean),
        )

    def _log_tail(
        self, queries: _Queries, last: Tensor, score: Tensor, left: int, rank: int
    ) -> Float[Tensor, " B"]:
        """Log of `left` times the largest mass an image can have whose logit (eq. 9) is at most `last`.

        As eq. 8, without a bound for the coordinates beyond the first r. What the product has rounded
        away is added: 2^-9 of each z_j and of each y_j, and of `score`, its result.
        """
        time, radius = queries.t.double(), self._embedding.radius
        noise = (1 - time).square()
        size = queries.y[:, :rank].double().norm(dim=1)
        slack = time / noise * radius * 2**-8 * (1.25 * size + time * radius) + 2**-8 * score.double().abs()
        inside = last + slack - 0.5 * size.square() / noise
        ball = (queries.c.double().norm(dim=1) - time * radius).clamp_min(0).square()
        return torch.minimum(inside, -0.5 * ball / noise) + torch.tensor(float(left)).log()

    def _far(self, queries: _Queries, rests: list[_Rest]) -> WeightedMean:
        """All levels' rests as one part: their coordinates are mixed, then made an image once."""
        log_masses = torch.stack([rest.log_mass for rest in rests], 1)
        log_mass = log_masses.logsumexp(1)
        shares = log_masses.softmax(1).nan_to_num(0).float()
        filled = self._residual.coordinates(queries.y, queries.t)
        mixed = torch.zeros_like(filled)
        for share, rest in zip(shares.T, rests, strict=True):
            known = rest.mean.shape[1]
            mixed += share[:, None] * torch.cat([rest.mean, filled[:, known:]], 1)
        return WeightedMean(
            log_mass,
            torch.stack([rest.log_square for rest in rests], 1).logsumexp(1),
            self._residual.mean(mixed, queries.c, queries.y, queries.t),
        )

    def _near(
        self, queries: _Queries, ids: Tensor, top: Tensor, rank: int
    ) -> tuple[WeightedMean, Int[Tensor, "B K"]]:
        """The candidates in pixels; those without weight are not read, and their ids become -1."""
        left = queries.outside + queries.y[:, rank:].double().square().sum(1)
        spread = self._residual.spread(left, queries.t, rank)
        margin = _IRRELEVANT + _DEVIATIONS * spread
        needed = (top.double() >= top[:, :1].double() - margin[:, None]).sum(1)
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
