"""One index under measurement: queries of the path, the exact field's answers, each way's errors and seconds.

Queries lie on straight paths from noise to images of the store (held in), and to images of another store
(held out); where none is given, to mirror images, which are natural images that the store does not hold. A
mirrored latent is not natural: of latents there are no held-out queries without another store.

Axes:  q queries of one time   D = C*H*W
"""

import re
import statistics
import time
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nnflow.index import NeighbourIndex
from nnflow.ladder import Ladder
from nnflow.path import interpolate
from nnflow.planned import looked_at, settled, support_of
from nnflow.planning import EXACT
from nnflow.store import ImageStore
from nnflow.support import Support

# Ladders that are tried; dearer ones where cheaper ones have met the finest tolerance are not.
LADDERS = (
    *("32/8 alone", "64/8 alone", "64/32 alone", "128/32 alone", "128/100 alone", "512/100 alone"),
    *("512/300 alone", "64/30", "64/100", "128/30", "128/100", "128/300", "256/30", "256/100", "256/300"),
    *("512/30", "512/100", "512/300", "512/500", "64/1000 512/100", "128/3000 512/100", "256/1000 512/300"),
    *("512/1000", "512/2000", "512/4000", "1024/300", "1024/1000", "1024/2000", "1024/4000"),
    *(f"{ladder} of {1 << 16}" for ladder in ("512/30", "512/100", "1024/300")),
    *(f"{ladder} of {1 << 18}" for ladder in ("128/100", "512/100", "512/300", "1024/300", "1024/1000")),
    *(f"{ladder} of {1 << 20}" for ladder in ("512/100", "512/300", "1024/300", "1024/1000")),
    f"512/500 rest of {1 << 18}",
    *(f"256/1000 512/{keep} rest of {1 << 17}" for keep in (100, 200)),
    *(f"256/2000 512/{keep} rest of {1 << 17}" for keep in (200, 300, 500)),
)
# Besides, what the index finds by itself where it need not compare all images: in the lists that were
# measured to be enough from t = .3 on, or in fewer, which are later. Of 1,281,167 images and 4,528 lists a
# query takes 0.81 ms in 64 of them; 0.16 in 8, which settle as many at t = .5; 0.08 in 2, likewise at t = .9.
SEARCHES = ("index/8 in 2 lists", "index/8 in 8 lists", "index/8", "index/32", "index/100")
# Asked first of all queries of a time, with a dearer way for those they do not settle.
FIRSTS = ("32/8 alone", "64/8 alone", "64/32 alone", "128/32 alone", *SEARCHES[:4])
AT_ONCE = 64  # queries asked and timed together
HELD_OUT = 4  # one held-out query for every four held in
_TOGETHER = AT_ONCE + AT_ONCE // HELD_OUT  # asked of the exact field together: both kinds in one pass


@dataclass(frozen=True)
class Asked:
    """Queries at one time, the exact mean there, |u*| (1 - t), and the seconds per query beside the call."""

    x: Float[Tensor, "q D"]
    t: Float[Tensor, " q"]
    mean: Float[Tensor, "q D"]
    size: Float[Tensor, " q"]
    seconds: float


@dataclass(frozen=True)
class Answered:
    """One way's answers: relative velocity errors, those of the mean in units of |mean - x|.

    Attributes:
        errors: of each query.
        settled: which need not be asked again, were another way to follow.
        seconds: per query, beside those of the call.
        again: share of the queries for which a second way was asked.
    """

    errors: Float[Tensor, " q"]
    settled: Bool[Tensor, " q"]
    seconds: float
    again: float = 0.0

    @classmethod
    def exactly(cls, asked: Asked) -> "Answered":
        """The exact field's own."""
        none = torch.zeros_like(asked.size)
        return cls(none, none.bool(), asked.seconds)

    def and_more(self, other: "Answered") -> "Answered":
        """With the answers to other queries, asked when this way was warm: their seconds count."""
        return Answered(
            torch.cat([self.errors, other.errors]), torch.cat([self.settled, other.settled]), other.seconds
        )

    def then(self, other: "Answered") -> "Answered":
        """With `other` for those queries that this way has not settled."""
        share = 1 - self.settled.float().mean().item()
        errors = torch.where(self.settled, self.errors, other.errors)
        return Answered(errors, self.settled | other.settled, self.seconds + share * other.seconds, share)


class Bench:
    """One index under measurement."""

    def __init__(self, index: NeighbourIndex, held_out: ImageStore | None, budget: int, seed: int) -> None:
        self.index, self.held_out, self.seed = index, held_out, seed
        self.rows = index.store.rows()
        self.directions = looked_at(index, self.rows.device)
        self.has_others = held_out is not None or index.store.codec.of_pixels
        self.images = slice(0, len(index))
        self.exact = support_of(EXACT, index, self.rows, budget)
        count, dim = index.store.pixels.shape
        ladders = [name for name in LADDERS if _saves(Ladder.parse(name), index, count, dim)]
        searches = [name for name in SEARCHES if _asks_less(name, index)]
        self.ways = {name: support_of(name, index, self.rows, budget) for name in [*searches, *ladders]}

    def queries(self, t: float, count: int, *, held_in: bool) -> tuple[Tensor, Tensor]:
        """x_t (count, D) and times, made of the seed and t alone."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + round(1e6 * t) + held_in)
        store = self.index.store if held_in or self.held_out is None else self.held_out
        x1 = store.images(torch.randint(len(store), (count,), generator=generator))
        if not held_in and self.held_out is None:
            x1 = x1.flip(-1)
        x0 = torch.randn(x1.shape, generator=generator)
        return interpolate(x0, x1, t).flatten(1), torch.full((count,), t)

    def ask(self, t: float, count: int, call: float) -> list[Asked]:
        """Queries held in, then any held out, and the exact answers: `call` seconds, and so many for each."""
        sets = [self.queries(t, count, held_in=True)]
        if self.has_others:
            sets.append(self.queries(t, max(2, count // HELD_OUT), held_in=False))
        x, times = (torch.cat(both) for both in zip(*sets, strict=True))
        mean, _, seconds = self.answer(self.exact, x, times, _TOGETHER)
        size = (mean - x).norm(dim=1)
        beside = max(0.0, seconds - call / min(_TOGETHER, len(x)))
        parts = [len(some) for some, _ in sets]
        columns = zip(x.split(parts), times.split(parts), mean.split(parts), size.split(parts), strict=True)
        return [Asked(*column, beside) for column in columns]

    def answered(self, way: Support, asked: Asked, call: float, rows: slice = slice(None)) -> Answered:
        """What a way, of which a call takes so many seconds, makes of some of the queries."""
        mean, single, seconds = self.answer(way, asked.x[rows], asked.t[rows])
        errors = (mean - asked.mean[rows]).norm(dim=1) / asked.size[rows]
        return Answered(errors, single, max(0.0, seconds - call / AT_ONCE))

    def answer(
        self, way: Support, x: Tensor, t: Tensor, size: int = AT_ONCE
    ) -> tuple[Float[Tensor, "q D"], Bool[Tensor, " q"], float]:
        """Means at some queries, `size` at once; which of them have settled; seconds per query.

        The seconds are those of the median whole batch.
        """
        means, single, seconds = [], [], []
        for some, times in zip(x.split(size), t.split(size), strict=True):
            began = time.perf_counter()
            part = way.part(some, times, self.images)
            if len(some) == min(size, len(x)):  # the last few of many cost more each
                seconds.append((time.perf_counter() - began) / len(some))
            means.append(part.weighted.mean)
            single.append(settled(part, some, times, self.directions))
        return torch.cat(means), torch.cat(single), statistics.median(seconds)


def _saves(ladder: Ladder, index: NeighbourIndex, count: int, dim: int) -> bool:
    """Whether a ladder is not the exact field under another name, nor another ladder under a second."""
    ranks = [rank for rank, _ in ladder.levels]
    known = all(index.coordinates.edge(rank) == rank for rank in ranks)
    fewer = ladder.drawn is None or 2 * ladder.drawn <= count
    return known and fewer and ranks[0] < dim and ladder.levels[0][1] < count


def _asks_less(name: str, index: NeighbourIndex) -> bool:
    """Whether a search is one of the index' own, and does not look into more lists than it does anyway."""
    if index.exact:
        return False
    k, *lists = (int(number) for number in re.findall(r"\d+", name))
    return k < len(index) and (not lists or lists[0] < index.manifest["probing"].get("probes", 0))
