"""The path and its four names, against densities whose answers are known on paper or by autograd."""

from collections.abc import Callable

import pytest
import torch
from oracles import velocity_from_score as velocity_by_autograd
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from nnflow import path

N, B, D = 6, 9, 4
TIMES = torch.tensor([0.02, 0.1, 0.25, 0.4, 0.5, 0.7, 0.85, 0.95, 0.99], dtype=torch.float64)


def mixture() -> tuple[Tensor, Tensor, Tensor]:
    """Images, points on the path to them, and their posterior means summed one by one."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(N, D, generator=generator, dtype=torch.float64) * 2 - 1
    x0 = torch.randn(B, D, generator=generator, dtype=torch.float64)
    x = (1 - TIMES[:, None]) * x0 + TIMES[:, None] * images[torch.arange(B) % N]
    means = []
    for point, time in zip(x, TIMES, strict=True):
        density = [Normal(time * image, 1 - time).log_prob(point).sum() for image in images]
        means.append(torch.stack(density).softmax(0) @ images)
    return images, x, torch.stack(means)


def score_by_autograd(images: Tensor, x: Tensor) -> Tensor:
    """Grad log p_t of the mixture sum_i N(t x_i, (1 - t)^2) / n, as torch.distributions has it."""
    found = []
    for point, time in zip(x, TIMES, strict=True):
        leaf = point.clone().requires_grad_()
        parts = Independent(Normal(time * images, (1 - time).expand(N, D)), 1)
        MixtureSameFamily(Categorical(torch.ones(N).double()), parts).log_prob(leaf).backward()
        assert leaf.grad is not None
        found.append(leaf.grad)
    return torch.stack(found)


def test_mean_velocity_and_score_are_those_of_a_gaussian_mixture() -> None:
    images, x, mean = mixture()
    score, velocity = score_by_autograd(images, x), velocity_by_autograd(images, x, TIMES)
    for found, wanted in [
        (path.score_from_mean(mean, x, TIMES), score),
        (path.velocity_from_mean(mean, x, TIMES), velocity),
        (path.mean_from_velocity(velocity, x, TIMES), mean),
        (path.mean_from_score(score, x, TIMES), mean),
        (path.score_from_velocity(velocity, x, TIMES), score),
        (path.velocity_from_score(score, x, TIMES), velocity),
    ]:
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_gaussian_data_by_hand() -> None:
    """x1 ~ N(mu, v): x_t ~ N(t mu, t^2 v + s^2) and E[x1 | x_t] is a regression line."""
    mu, v, x = 0.3, 0.25, torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    for t in (0.1, 0.5, 0.9):
        total = t * t * v + (1 - t) ** 2
        mean = mu + t * v / total * (x - t * mu)
        torch.testing.assert_close(path.score_from_mean(mean, x, t), -(x - t * mu) / total)
        # E[x1 - x0 | x_t] by the same regression, without the posterior mean
        velocity = mu + (t * v - (1 - t)) / total * (x - t * mu)
        torch.testing.assert_close(path.velocity_from_mean(mean, x, t), velocity)


Conversion = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.mark.parametrize(
    ("there", "back"),
    [
        (path.velocity_from_mean, path.mean_from_velocity),
        (path.score_from_mean, path.mean_from_score),
        (path.score_from_velocity, path.velocity_from_score),
    ],
)
def test_every_conversion_has_its_way_back(there: Conversion, back: Conversion) -> None:
    generator = torch.Generator().manual_seed(1)
    value, x = torch.randn(2, B, 3, 4, 5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(back(there(value, x, TIMES), x, TIMES), value, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(there(back(value, x, TIMES), x, TIMES), value, rtol=1e-10, atol=1e-10)


def test_the_path_leads_from_noise_to_data_in_a_straight_line() -> None:
    generator = torch.Generator().manual_seed(2)
    x0, x1 = torch.randn(2, B, 3, 4, 5, generator=generator, dtype=torch.float64)
    assert torch.equal(path.interpolate(x0, x1, 0.0), x0)
    assert torch.equal(path.interpolate(x0, x1, 1.0), x1)
    x = path.interpolate(x0, x1, TIMES)
    torch.testing.assert_close(path.velocity_from_mean(x1, x, TIMES), x1 - x0)
    leaf = TIMES.clone().requires_grad_()
    path.interpolate(x0, x1, leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, (x1 - x0).flatten(1).sum(1))


def test_one_time_is_that_time_for_every_row() -> None:
    generator = torch.Generator().manual_seed(3)
    x0, x1 = torch.randn(2, 3, 3, 3, 3, generator=generator)  # B = C = H = W: only the first axis is meant
    rows = torch.tensor([0.2, 0.5, 0.7])
    together = path.interpolate(x0, x1, rows)
    for row, time in enumerate(rows.tolist()):
        alone = path.interpolate(x0, x1, time)
        torch.testing.assert_close(together[row], alone[row], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(path.interpolate(x0, x1, torch.tensor(time)), alone)
    assert path.interpolate(x0, x1, 0.3).dtype == torch.float32


def test_denoiser_convention_is_data_plus_noise() -> None:
    """x_t / t = x1 + sigma x0: dividing the path by t gives Karras' noisy image at his noise level."""
    generator = torch.Generator().manual_seed(4)
    x0, x1 = torch.randn(2, B, 2, 2, 2, generator=generator)
    t = TIMES.float()
    sigma = path.sigma_of_time(t)
    noisy = path.interpolate(x0, x1, t) / path.along(t, x1)
    torch.testing.assert_close(noisy, x1 + path.along(sigma, x0) * x0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(path.time_of_sigma(sigma), t, rtol=1e-6, atol=0)
    assert path.time_of_sigma(1.0) == 0.5
    assert path.sigma_of_time(0.2) == pytest.approx(4.0)
