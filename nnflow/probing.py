"""How many of an index's inverted lists a search looks into: as few as find the images that matter.

Measured on the path's own queries x_t / t, at times from which on the near field is all there is. Of the
100 images that a search of all lists finds nearest, each counts by its weight in the field there; the share
of the weight that fewer lists find is their recall.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nnflow.embedding import Embedding
from nnflow.faiss_backend import lists_of
from nnflow.path import interpolate
from nnflow.store import ImageStore

TIMES = (0.3, 0.4, 0.5, 0.7, 0.9)
_QUERIES = 64  # at each time
_NEAREST = 100
_RECALL = 0.999


@dataclass(frozen=True)
class Probing:
    """What was measured.

    Attributes:
        lists: inverted lists of the index.
        probes: of them searched.
        recall: mean share of the weight found, over the queries at `TIMES`.
    """

    lists: int
    probes: int
    recall: float


def set_probes(vectors: Any, store: ImageStore, embedding: Embedding, seed: int) -> Probing | None:
    """Makes `vectors` search the least power of two of lists that finds 99.9 % of the weight.

    Args:
        vectors: a faiss index over all images of `store`; one without lists stays as it is.
        store: the images.
        embedding: the coordinates it searches.
        seed: of the queries.
    """
    inner = lists_of(vectors)
    if inner is None:
        return None
    queries, gain = _queries(store, embedding, seed)
    inner.nprobe = inner.nlist
    squares, nearest = vectors.search(queries, min(_NEAREST, len(store)))
    logits = torch.from_numpy(squares).double() * -0.5 * gain[:, None]
    weights = logits.masked_fill(torch.from_numpy(nearest) < 0, -torch.inf).softmax(1)
    recall, inner.nprobe = 0.0, 1
    while True:
        _, found = vectors.search(queries, nearest.shape[1])
        hit = [np.isin(all_of_them, some) for all_of_them, some in zip(nearest, found, strict=True)]
        recall = (weights * torch.from_numpy(np.stack(hit))).sum(1).mean().item()
        if recall >= _RECALL or inner.nprobe >= inner.nlist:
            return Probing(int(inner.nlist), int(inner.nprobe), recall)
        inner.nprobe = min(2 * inner.nprobe, inner.nlist)


def _queries(store: ImageStore, embedding: Embedding, seed: int) -> tuple[np.ndarray, Float[Tensor, " q"]]:
    """Coordinates of x_t / t, float32 (q, r), and (t / (1-t))^2, by which their squared distances count."""
    generator = torch.Generator().manual_seed(seed)
    count = _QUERIES * len(TIMES)
    ids = torch.randint(len(store), (count,), generator=generator)
    x1 = store.rows().values(ids, 0).view(count, *store.shape[1:])
    t = torch.tensor(TIMES).repeat_interleave(_QUERIES)
    xt = interpolate(torch.randn(x1.shape, generator=generator), x1, t).flatten(1)
    coordinates = embedding(xt / t[:, None])
    return np.ascontiguousarray(coordinates.numpy()), (t.double() / (1 - t.double())).square()
