"""What an image's first r coordinates leave open, taken as Gaussian and integrated out.

With a = (1-t)^2, c = x - t mean, y = P c and v_j the variance of the images along direction j, independent
of the first r coordinates (docs/field.md, eqs. 10 to 12):

    log E exp(l_i) = -|y_r - t z_i|^2 / (2 a) + k_r,
    k_r            = sum_{j > r} [ -1/2 log(1 + t^2 v_j / a) - 1/2 y_j^2 / (a + t^2 v_j) ]
    E[coordinate j | x_t = x] = t v_j y_j / (a + t^2 v_j)

Directions beyond the R kept share one variance: of y only |c|^2 - |y|^2 is needed there.

Axes:  B queries   R directions kept   D values of one image
"""

import torch
from jaxtyping import Float
from torch import Tensor

from nnflow.embedding import Embedding


class Residual:
    """The Gaussian of the coordinates beyond the first r, for any r up to R."""

    def __init__(self, embedding: Embedding) -> None:
        kept = len(embedding.principal)
        spectrum = embedding.spectrum.double()
        self._embedding = embedding
        self._variances = spectrum[:kept].to(embedding.principal.device)
        self._unkept = len(spectrum) - kept
        self._variance_beyond = spectrum[kept:].mean().item() if self._unkept else 0.0

    def spread(self, left: Float[Tensor, " B"], t: Float[Tensor, " B"], rank: int) -> Float[Tensor, " B"]:
        """Standard deviation, from image to image, of what the other coordinates add to a logit (eq. 12).

        Args:
            left: |c|^2 outside the first `rank` coordinates.
            t: times.
            rank: r.
        """
        time = t.double()
        noise = (1 - time).square()
        first, second = self._power_sums(rank)
        room = len(self._embedding.mean) - rank
        expected = room * noise + time.square() * first
        linear = left.double() / expected.clamp_min(1e-30) * (noise * first + time.square() * second)
        return time / noise * (linear + 0.5 * time.square() * second).sqrt()

    def _power_sums(self, rank: int) -> tuple[float, float]:
        """Sums of the variances outside the first `rank` coordinates, and of their squares."""
        kept, beyond = self._variances[rank:], self._variance_beyond
        first = kept.sum().item() + self._unkept * beyond
        return first, kept.square().sum().item() + self._unkept * beyond**2

    def log_mass(
        self, y: Float[Tensor, "B R"], outside: Float[Tensor, " B"], t: Float[Tensor, " B"], rank: int
    ) -> Float[Tensor, " B"]:
        """k_r of eq. 10, float64.

        Args:
            y: all kept coordinates of c.
            outside: |c|^2 - |y|^2.
            t: times.
            rank: r.
        """
        time = t.double()[:, None]
        noise = (1 - time).square()
        spread = time.square() * self._variances[rank:]
        total = -0.5 * (torch.log1p(spread / noise) + y[:, rank:].double().square() / (noise + spread)).sum(1)
        noise, beyond = noise[:, 0], t.double().square() * self._variance_beyond
        total -= 0.5 * self._unkept * torch.log1p(beyond / noise)
        return total - 0.5 * outside.double() / (noise + beyond)

    def coordinates(self, y: Float[Tensor, "B R"], t: Float[Tensor, " B"]) -> Float[Tensor, "B R"]:
        """Posterior mean of every kept coordinate (eq. 11): a Wiener filter."""
        time = t[:, None]
        variances = self._variances.float()
        return y * (time * variances / ((1 - time).square() + time.square() * variances))

    def mean(
        self,
        coordinates: Float[Tensor, "B R"],
        c: Float[Tensor, "B D"],
        y: Float[Tensor, "B R"],
        t: Float[Tensor, " B"],
    ) -> Float[Tensor, "B D"]:
        """The image of these coordinates, and beyond them of eq. 11's mean."""
        time = t[:, None]
        beyond = time * self._variance_beyond
        gain = beyond / ((1 - time).square() + time * beyond)
        principal = self._embedding.principal
        return torch.addmm(self._embedding.mean, coordinates - gain * y, principal).addcmul_(gain, c)
