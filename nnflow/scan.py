"""Every stored image in one sum: the exact field, and exact nearest neighbours.

    l_i = t (x.x_i) / (1-t)^2 - t^2 |x_i|^2 / (2 (1-t)^2)          (docs/field.md, eq. 5)

which is the logit of eq. 3 less a term the images share; written so, nothing is divided by t. It is one
matrix product per block of images, and in float32 off by up to 0.4 in a weight at t = .99, where two
near-duplicates compete: the expansion finds who matters, `nearfield` weighs those by difference.

Axes:  B queries   R images of a block   n images   K images weighed by difference   D = C*H*W
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from nnflow.errors import InputError
from nnflow.memory import DEFAULT_BUDGET, rows_within
from nnflow.nearfield import Near, by_difference, competing_margin, weigh
from nnflow.pixels import PixelRows
from nnflow.precision import full_float32
from nnflow.store import ImageStore
from nnflow.support import Part, Support
from nnflow.weighted import WeightedMean

_PLAIN_GAIN = 0.1  # t = .085: by then the expansion leaves 3e-6 of relative error in the velocity
_WEIGHED = 32  # images per query weighed by difference
# Where the expansion errs by 1e-3 and more (gain above 5: t > .64) and those 32 all compete, this many are.
_WEIGHED_WIDE, _WIDE_GAIN = 1024, 5.0
# Share of the mass outside the K images below which their mean is the mean: a rounding of float32.
_NEGLIGIBLE = 1e-8


class AllImages(Support):
    """The whole sum of docs/field.md, eq. 1, streamed in blocks within a memory budget."""

    def __init__(self, rows: PixelRows, *, budget: int) -> None:
        super().__init__(rows, budget=budget)
        self._norms = rows.squared_norms(budget).float()

    def part(self, x: Float[Tensor, "B D"], t: Float[Tensor, " B"], images: slice) -> Part:
        """Two passes over the images: their logits, then the mean of those queries that need it.

        A query whose mass lies on the K images weighed by difference is done after the first pass.
        """
        count = images.stop - images.start
        # A quarter is the pixel block, a quarter the differences; the rest logits and a few vectors.
        per_query = 4 * count + 24 * self.rows.dim
        chunk = rows_within(self.budget, per_query, at_most=len(x), what="logits", share=2)
        parts = [
            self._chunk(some, times, images)
            for some, times in zip(x.split(chunk), t.split(chunk), strict=True)
        ]
        weighted = WeightedMean(
            torch.cat([part.log_mass for part in parts]),
            torch.cat([part.log_square for part in parts]),
            torch.cat([part.mean for part in parts]),
        )
        return Part.summed(weighted, "exact", ids=count, error=0.0)

    def _chunk(self, x: Tensor, t: Tensor, images: slice) -> WeightedMean:
        logits = self._logits(x, t, images)
        top, places = logits.topk(min(_WEIGHED, logits.shape[1]), dim=1)
        near = weigh(
            self.rows,
            places + images.start,
            x,
            t,
            budget=self.budget // 4,
            norms=self._norms,
            plain_gain=_PLAIN_GAIN,
        )
        # From here on logits are relative to the anchor's, and those by difference replace the others.
        logits.sub_(top.gather(1, near.anchor[:, None])).scatter_(1, places, near.logits)
        self._widen(logits, places, near, x, t, images)
        highest = logits.amax(1)
        # exp(-80) adds 1e-35 an image; below exp(-87) float32 is denormal and products with it crawl.
        weights = logits.sub_(highest[:, None]).clamp_min_(-80.0).exp_()
        # Summed in float32, whose cascade errs by 1e-7: in float64 torch copies all weights first.
        mass = weights.sum(1).double()
        log_mass = near.offset + highest.double() + mass.log()
        squares = torch.linalg.vector_norm(weights, dim=1).double().log()
        mean = near.mean
        settled = (near.logits - highest[:, None]).exp().sum(1, dtype=torch.float64)
        rest = (mass - settled > _NEGLIGIBLE * mass).nonzero()[:, 0]
        if len(rest):
            for place, row in enumerate(rest.tolist()):  # moved to the front: a copy would be as large again
                if place != row:
                    weights[place] = weights[row]
            # divided in float32: by a float64 column torch would first copy all weights at twice the size
            mean[rest] = self._mean(weights[: len(rest)].div_(mass[rest, None].float()), images)
        return WeightedMean(log_mass, 2 * (squares - mass.log() + log_mass), mean)

    def _widen(self, logits: Tensor, places: Tensor, near: Near, x: Tensor, t: Tensor, images: slice) -> None:
        """Weighs more images by difference where all of `places` compete: crowds of near-duplicates."""
        gain = t.double() / (1 - t.double()).square()
        crowded = (near.logits.amin(1) > -competing_margin(self.rows, x, t)) & (gain > _WIDE_GAIN)
        if places.shape[1] == logits.shape[1]:
            return
        for row in crowded.nonzero()[:, 0].tolist():
            here = slice(row, row + 1)
            ids = logits[here].topk(min(_WEIGHED_WIDE, logits.shape[1]), dim=1).indices
            # the anchor first, so that both sets of logits are relative to it
            ids = torch.cat([places[here].gather(1, near.anchor[here, None]), ids], 1)
            anchor = torch.zeros(1, dtype=torch.int64, device=ids.device)
            wide = by_difference(
                self.rows, ids + images.start, x[here], t[here], anchor, budget=self.budget // 4
            )
            logits[here].scatter_(1, ids, wide)

    def reach(self, mean: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
        """The longest image, plus the way there: never asked in earnest."""
        return self.rows.longest + (mean.double() - self.rows.codec.offset).norm(dim=1)

    def _logits(self, x: Tensor, t: Tensor, images: slice) -> Float[Tensor, "B n"]:
        inverse = (1 - t.double()).square().reciprocal()
        scale = (t.double() * inverse / self.rows.codec.unit).float()
        norm_scale = (-0.5 * t.double().square() * inverse).float()
        scaled = x * scale[:, None]
        logits = x.new_empty(len(x), images.stop - images.start)
        for start, stop, block in self.rows.blocks(self.budget, images.start, images.stop):
            # x.x_i = x.p_i / unit + offset sum(x), and sum(x) is shared by all images
            product = torch.mm(scaled, block.T).addr_(norm_scale, self._norms[start:stop])
            logits[:, start - images.start : stop - images.start] = product
        return logits

    def _mean(self, weights: Float[Tensor, "B n"], images: slice) -> Float[Tensor, "B D"]:
        total = weights.new_zeros(len(weights), self.rows.dim)
        for start, stop, block in self.rows.blocks(self.budget, images.start, images.stop):
            total.addmm_(weights[:, start - images.start : stop - images.start], block)
        return self.rows.codec.values_(total)


@dataclass(frozen=True)
class Nearest:
    """The stored images nearest to S queries, nearest first.

    Attributes:
        ids: rows of the store.
        distances: L2 in units of the values, by difference.
        mirrored: whether it is the image's mirror image that lies so near.
    """

    ids: Int[Tensor, "S k"]
    distances: Float[Tensor, "S k"]
    mirrored: Bool[Tensor, "S k"]

    def images(self, store: ImageStore, place: int = 0) -> Float[Tensor, "S C H W"]:
        """The images at one `place` in the order, mirrored where those are meant."""
        found = store.images(self.ids[:, place].cpu())
        found[self.mirrored[:, place].cpu()] = found[self.mirrored[:, place].cpu()].flip(-1)
        return found


@full_float32()
def nearest_images(
    store: ImageStore,
    x: Tensor,
    k: int,
    *,
    flip: bool = False,
    memory: int = DEFAULT_BUDGET,
    progress: bool = False,
) -> Nearest:
    """The `k` stored images nearest to each of `x` in all values, by comparing with all of them.

    One matrix product per block proposes k + 32 candidates, differences order them: exact but for ties
    closer than float32 rounding.

    Args:
        store: the images.
        x: float (S, C, H, W), as the field takes them; the answer is where it is.
        k: neighbours wanted.
        flip: an image is as near as itself or its mirror image, whichever is nearer.
        memory: working memory in bytes.
        progress: show a bar on stderr.

    Raises:
        InputError: k outside 1 ... n, a shape that is not the store's, NaN, or latents to be mirrored.
    """
    if not 1 <= k <= len(store):
        raise InputError(f"k = {k} neighbours: wanted 1 to the {len(store)} images stored")
    if tuple(x.shape[1:]) != store.shape[1:] or not bool(x.isfinite().all()):
        raise InputError(
            f"images of shape {tuple(x.shape)}: wanted finite values of shape (S, "
            f"{', '.join(map(str, store.shape[1:]))})"
        )
    store.refuse_flip(flip)
    store.check_unchanged()
    rows = store.rows(x.device)
    found = _nearest(rows, x.detach().flatten(1).float(), k, memory, progress)
    if not flip:
        return found
    return _nearer(found, _nearest(rows, x.detach().flip(-1).flatten(1).float(), k, memory, progress))


def _nearer(one: Nearest, mirrored: Nearest) -> Nearest:
    """The k nearest of two searches, each image once: as near as in the search that has it nearer.

    The k nearest are among the k of either, as an image is one of the k nearest where it is nearer.
    """
    k = one.ids.shape[1]
    distances, order = torch.cat([one.distances, mirrored.distances], 1).sort(dim=1, stable=True)
    ids = torch.cat([one.ids, mirrored.ids], 1).gather(1, order)
    again = (ids[:, :, None] == ids[:, None]).tril(-1).any(2)
    first = again.to(torch.uint8).argsort(dim=1, stable=True)[:, :k]
    return Nearest(ids.gather(1, first), distances.gather(1, first), (order >= k).gather(1, first))


def _nearest(rows: PixelRows, flat: Float[Tensor, "S D"], k: int, memory: int, progress: bool) -> Nearest:
    wanted = min(k + _WEIGHED, rows.count)
    # scores of one block and the differences of the candidates
    per_query = 8 * rows.block_rows(memory) + 8 * wanted * rows.dim
    chunk = rows_within(memory, per_query, at_most=len(flat), what="scores", share=2)
    ids, distances = [], []
    for queries in tqdm(flat.split(chunk), "nearest images", disable=not progress):
        places = _top_by_expansion(rows, queries, wanted, memory)
        squares = queries.new_empty(places.shape)
        for row, (query, mine) in enumerate(zip(queries, places, strict=True)):
            squares[row] = (rows.values(mine) - query).square().sum(1)
        order = squares.argsort(dim=1, stable=True)[:, :k]
        ids.append(places.gather(1, order))
        distances.append(squares.gather(1, order).sqrt())
    places = torch.cat(ids)
    return Nearest(places, torch.cat(distances), torch.zeros_like(places, dtype=torch.bool))


def _top_by_expansion(rows: PixelRows, x: Float[Tensor, "S D"], k: int, budget: int) -> Int[Tensor, "S k"]:
    """Ids of the k largest x.x_i - |x_i|^2 / 2, kept block by block; ascending by id."""
    best = x.new_empty(len(x), 0)
    ids = torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
    for start, stop, block in rows.blocks(budget):
        rows.codec.values_(block)
        scores = torch.mm(x, block.T).sub_(0.5 * block.square().sum(1))
        here = torch.arange(start, stop, device=x.device).expand(len(x), -1)
        best, places = torch.cat([best, scores], 1).topk(min(k, best.shape[1] + len(block)), dim=1)
        ids = torch.cat([ids, here], 1).gather(1, places)
    return ids.sort(1).values
