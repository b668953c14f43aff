"""Variances of targets and gradients, against paper and pencil."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from contract import all_images, pixels_of
from stores import store_of
from torch import Tensor, nn

from nnflow.errors import InputError
from nnflow.noise import batch_gradient, gradient_deviations, target_noise, target_variance, through
from nnflow.store import ImageStore
from nnflow.targets import make_matcher
from nnflow.velocity import EmpiricalVelocity


class Linear(nn.Module):
    """u = A x, whatever t."""

    def __init__(self, values: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.matrix = nn.Parameter(torch.randn(values, values, generator=generator) / values)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return (x.flatten(1) @ self.matrix.T).view_as(x)


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return store_of(pixels_of(20), tmp_path)


@dataclass(frozen=True)
class Pencil:
    """eq. 3 of a linear model: grad_A = 2 / (B D) sum_b (A x_b - T_b) x_b^T, by loops in float64."""

    matrix: Tensor

    def gradient(self, x: Tensor, targets: Tensor) -> Tensor:
        total = torch.zeros_like(self.matrix)
        for row, target in zip(x.flatten(1).double(), targets.flatten(1).double(), strict=True):
            total += torch.outer(self.matrix @ row - target, row)
        return 2 * total / x.numel()


def test_gradients_of_a_linear_model() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 1, 2, 2, generator=generator)
    targets = torch.randn(3, 5, 1, 2, 2, generator=generator)
    model, t = Linear(4), torch.full((3,), 0.5)
    pencil = Pencil(model.matrix.detach().double())
    loss, gradient = batch_gradient(model, x, t, targets[:, 0])
    wanted = pencil.gradient(x, targets[:, 0])
    torch.testing.assert_close(gradient[:16].view(4, 4), wanted, rtol=1e-5, atol=1e-6)
    assert gradient[16:].tolist() == [0, 0, 0]
    residual = x.flatten(1).double() @ pencil.matrix.T - targets[:, 0].flatten(1)
    assert loss == pytest.approx(float(residual.square().mean()), rel=1e-5)
    each = torch.stack([pencil.gradient(x, targets[:, r]) for r in range(5)])
    spread = float(each.flatten(1).var(0).sum())
    assert gradient_deviations(model, x, t, targets) == pytest.approx(spread, rel=1e-5)
    same = targets[:, :1].expand(-1, 5, -1, -1, -1)
    assert gradient_deviations(model, x, t, same) == 0.0


@pytest.mark.parametrize("flip", [False, True])
def test_pairs_through_a_point_follow_the_posterior(store: ImageStore, flip: bool) -> None:
    t, draws = 0.3, 5_000
    generator = torch.Generator().manual_seed(2)
    xt = t * store.images(torch.tensor([3, 8])) + (1 - t) * torch.randn(2, 3, 4, 4, generator=generator)
    again = through(store, xt, t, draws, generator=generator, flip=flip, memory=1 << 20)
    images = all_images(store)
    if flip:
        images = torch.cat([images, images.view(-1, 3, 4, 4).flip(-1).flatten(1)])
    number = again.ids + (0 if again.flipped is None else again.flipped * len(store))
    x1 = images[number].view(-1, 3, 4, 4)
    torch.testing.assert_close(again.x1.double(), x1, rtol=0, atol=1e-6)
    point = (1 - t) * again.x0 + t * again.x1
    torch.testing.assert_close(point, xt.repeat_interleave(draws, 0), rtol=0, atol=1e-5)
    for row in range(2):
        squares = (xt[row].flatten().double() - t * images).square().sum(1)
        weights = (-squares / (2 * (1 - t) ** 2)).softmax(0)
        assert weights.max() < 0.95, "one image has all the mass: nothing to prove"
        counts = torch.bincount(number[row * draws : (row + 1) * draws], minlength=len(images))
        error = (weights * (1 - weights) / draws).sqrt() + 1e-4
        assert ((counts / draws - weights).abs() / error).max() < 4.5


def test_the_variance_of_cfm_is_that_of_the_posterior(store: ImageStore) -> None:
    """sum_i w_i |x_i - m|^2 / (1 - t)^2 / D, and none of it is left in u*."""
    t, draws = 0.3, 20_000
    generator = torch.Generator().manual_seed(2)
    xt = t * store.images(torch.tensor([3])) + (1 - t) * torch.randn(1, 3, 4, 4, generator=generator)
    images = all_images(store)
    weights = (-(xt.flatten().double() - t * images).square().sum(1) / (2 * (1 - t) ** 2)).softmax(0)
    mean = weights @ images
    wanted = float((weights * (images - mean).square().sum(1)).sum()) / (1 - t) ** 2 / 48
    again = through(store, xt, t, draws, generator=generator)
    found = {}
    for name in ("cfm", "efm"):
        field = EmpiricalVelocity.exact(store, device="cpu")
        matcher = make_matcher(name, store, field=field)
        _, _, ut = matcher.sample_location_and_conditional_flow(again.x0, again.x1, again.t, ids=again.ids)
        found[name] = float(target_variance(ut.view(1, draws, 3, 4, 4)))
    assert found["cfm"] == pytest.approx(wanted, rel=0.03)
    assert found["efm"] < 1e-10 * wanted


def test_what_the_target_adds_and_what_is_left_make_the_whole(store: ImageStore) -> None:
    """Eq. 4, which no line of the module adds up: its first term is what cfm has beyond efm."""
    field = EmpiricalVelocity.exact(store, device="cpu")
    matchers = {name: make_matcher(name, store, field=field) for name in ("cfm", "efm", "otcfm")}
    model = Linear(48)
    found = target_noise(model, store, matchers, times=(0.3,), batch=4, draws=3, batches=150, seed=3)
    assert found["otcfm"].target is None
    assert found["otcfm"].gradient_target is None
    noisy, plain = found["cfm"], found["efm"]
    assert plain.gradient_target == pytest.approx((0,), abs=1e-12)
    assert noisy.gradient_target[0] > 0.04 * noisy.gradient[0], "nothing to prove"
    assert noisy.gradient[0] - plain.gradient[0] == pytest.approx(noisy.gradient_target[0], rel=0.25)
    # E |u - T|^2 = |u - u*|^2 + Var T
    assert noisy.loss[0] - plain.loss[0] == pytest.approx(noisy.target[0], rel=0.15)
    assert not model.unused.grad
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_batches_are_the_same_for_every_target_and_seeded(store: ImageStore) -> None:
    def found(seed: int, *names: str) -> dict:
        matchers = {name: make_matcher(name, store, samples=3) for name in names}
        return target_noise(
            Linear(48), store, matchers, times=(0.2,), batch=4, draws=2, batches=2, seed=seed, flip=True
        )

    alone, beside, other = found(7, "cfm"), found(7, "efm-m", "cfm"), found(8, "cfm")
    assert alone["cfm"] == beside["cfm"]
    assert alone["cfm"] != other["cfm"]
    with pytest.raises(InputError, match="1 draws"):
        target_noise(Linear(48), store, {}, times=(0.2,), draws=1)
