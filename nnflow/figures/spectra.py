"""All variances of a set of images along its principal directions, which the collapse time is predicted from.

    v = eigenvalues of  1/n sum_i (x_i - mean)(x_i - mean)',   D of them, at most n - 1 above zero

Few images of many pixels have the same ones through their n x n inner products, and exactly: an embedding
keeps 512 and spreads what is left over all other directions.

Axes:  n images   D = C*H*W values of one image
"""

import torch
from jaxtyping import Float
from torch import Tensor

from nnflow.codec import BYTES
from nnflow.fitting import fit_embedding
from nnflow.store import ImageStore

_MOST = 4096  # images whose inner products are taken: their eigenvalues take 10 s on one core
_COLUMNS = 4096  # pixels of a block: 64 MiB of float32 for as many images
_DIRECT_DIM = 4096  # values up to which the covariance itself is summed (fitting)


def spectrum_of(store: ImageStore, *, budget: int, seed: int = 0) -> Float[Tensor, " D"]:
    """The variances, descending, in units of pixels of [-1, 1], float64.

    Exact for up to 4,096 images or 4,096 values, within `budget` bytes; beyond, of a random subset of the
    images (`fitting.fit_embedding`), drawn by `seed`.
    """
    count, dim = store.pixels.shape
    if dim <= _DIRECT_DIM or count > _MOST:
        return fit_embedding(store, rank=1, budget=budget, seed=seed).spectrum.double()
    return spectrum_of_few(store)


def spectrum_of_few(store: ImageStore) -> Float[Tensor, " D"]:
    """The variances through the inner products of all images, each summed in float64 over blocks."""
    count, dim = store.pixels.shape
    products = torch.zeros(count, count, dtype=torch.float64)
    for start in range(0, dim, _COLUMNS):
        block = store.pixels[:, start : start + _COLUMNS].float().sub_(BYTES.unit)
        block.sub_(block.mean(0))
        products += (block @ block.T).double()
    values = torch.linalg.eigvalsh(products / (count * BYTES.unit**2)).flip(0).clamp_min(0)
    spectrum = torch.zeros(dim, dtype=torch.float64)
    spectrum[: min(count, dim)] = values[:dim]
    return spectrum
