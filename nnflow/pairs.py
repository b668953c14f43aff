"""Training pairs of noise and image, and minibatch optimal transport between them.

    x_t = (1 - t) x0 + t x1,   t = 0 noise x0, t = 1 data x1                                  (1)
    min over permutations p of  sum_i |x1_i - x0_p(i)|^2                                      (2)

Independent pairs leave the choice of p to chance. With (2), solved exactly for each batch, paths cross
less: OT-CFM (Tong et al. 2024, arXiv 2302.00482; Pooladian et al. 2023, arXiv 2304.14772). Noise and
images keep their laws, the pairs do not: p_t and its velocity are other ones, and depend on B.

Axes:  B pairs of a batch
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nnflow.errors import InputError
from nnflow.path import along
from nnflow.tally import Tally


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


def transported(
    x0: Float[Tensor, "B *s"], x1: Float[Tensor, "B *s"], labels: Int[Tensor, " B"] | None = None
) -> Float[Tensor, "B *s"]:
    """The noise of a batch in the order of eq. 2: row i goes with image i.

    Args:
        x0: noise.
        x1: data.
        labels: exchange noise among images of one class only. Over all classes the noise of a class
            would no longer be N(0, I), from which its samples start.

    Raises:
        InputError: NaN or infinity among them.
    """
    images, noise = x1.flatten(1).double(), x0.flatten(1).double()
    every = torch.arange(len(x0), device=x0.device)
    order = every.clone()
    groups = [every] if labels is None else [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    for rows in groups:
        # |x1_i|^2 and |x0_j|^2 are the same in every permutation, so that -2 x1_i.x0_j is left of eq. 2
        order[rows] = rows[cheapest(-(images[rows] @ noise[rows].T)).to(x0.device)]
    return x0[order]


def cheapest(cost: Float[Tensor, "B b"]) -> Int[Tensor, " B"]:
    """The column of each row in the permutation of least total cost; exact, O(B^3).

    Shortest augmenting paths (Jonker and Volgenant 1987): prices u, v with u_i + v_j <= cost_ij, equal for
    assigned pairs, prove the assignment cheapest when the last row has its column.

    Raises:
        InputError: a table that is not square, or NaN or infinity in it.
    """
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1] or not bool(cost.isfinite().all()):
        raise InputError(f"costs of shape {tuple(cost.shape)}: wanted finite numbers in a square table")
    table = cost.detach().double().cpu().numpy()
    v = table.min(0) if len(table) else np.zeros(0)
    u = (table - v).min(1) if len(table) else np.zeros(0)
    column_of, row_of = np.full(len(table), -1), np.full(len(table), -1)
    for row, column in enumerate((table - v).argmin(1) if len(table) else ()):
        if row_of[column] < 0:  # tight already: about two thirds of the rows of random costs
            row_of[column], column_of[row] = row, column
    for row in np.flatnonzero(column_of < 0).tolist():
        _augment(row, table, u, v, row_of, column_of)
    return torch.from_numpy(column_of)


def _augment(
    start: int, table: np.ndarray, u: np.ndarray, v: np.ndarray, row_of: np.ndarray, column_of: np.ndarray
) -> None:
    """Gives row `start` a column along the shortest path, in reduced costs, to a free one (Dijkstra)."""
    shortest = np.full(len(table), np.inf)
    before, done = np.full(len(table), -1), np.zeros(len(table), bool)
    row, length, column = start, 0.0, -1
    while column < 0 or row_of[column] >= 0:
        row = start if column < 0 else int(row_of[column])
        reach = length + table[row] - u[row] - v
        nearer = ~done & (reach < shortest)
        shortest[nearer], before[nearer] = reach[nearer], row
        column = int(np.where(done, np.inf, shortest).argmin())
        length, done[column] = shortest[column], True
    # prices: every edge of the path becomes tight, none below its cost
    u[start] += length
    passed = done & (row_of >= 0)
    u[row_of[passed]] += length - shortest[passed]
    v[done] -= length - shortest[done]
    while True:
        row = int(before[column])
        row_of[column] = row
        column, column_of[row] = int(column_of[row]), column
        if row == start:
            return
