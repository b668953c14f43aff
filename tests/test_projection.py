"""Coordinates of stored numbers, by bytes and by floats, against float64."""

import math

import pytest
import torch
from torch import Tensor

from nnflow import integers
from nnflow.codec import BYTES, Codec
from nnflow.projection import Projection, centred


def directions_of(rank: int, dim: int) -> Tensor:
    """Orthonormal, one of them nearly a single pixel: its other entries are small beside the largest."""
    generator = torch.Generator().manual_seed(rank + dim)
    made = torch.randn(rank, dim, generator=generator, dtype=torch.float64)
    made[0, dim // 2] += 30
    return torch.linalg.qr(made.T)[0].T.float().contiguous()


def pixels_of(count: int, dim: int) -> Tensor:
    """Noise, after a black image and a white one."""
    found = torch.randint(0, 256, (count, dim), generator=torch.Generator().manual_seed(dim)).to(torch.uint8)
    found[0] = 0
    found[count // 2] = 255
    return found


def exactly(numbers: Tensor, mean: Tensor, principal: Tensor, codec: Codec) -> tuple[Tensor, Tensor]:
    """Coordinates, and how long each centred image is, float64."""
    x = numbers.double() / codec.unit + codec.offset - mean.double()
    return torch.einsum("md,rd->mr", x, principal.double()), x.norm(dim=1)


@pytest.mark.parametrize("rows", [1, 2, 17, 200])
@pytest.mark.parametrize(("rank", "dim"), [(1, 3), (5, 75), (12, 192), (64, 768), (512, 3072)])
@pytest.mark.parametrize("by_bytes", [True, False])
def test_coordinates_are_those_of_float64(
    rows: int, rank: int, dim: int, by_bytes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not by_bytes:
        monkeypatch.setattr(integers, "factor_levels", lambda: 0)
    elif integers.factor_levels() < integers.LEVELS:
        pytest.skip("this processor does not multiply bytes of all levels fast")
    principal, numbers = directions_of(rank, dim), pixels_of(rows, dim)
    mean = torch.linspace(-0.6, 0.8, dim)
    project = Projection(mean, principal, BYTES)
    wanted, length = exactly(numbers, mean, principal, BYTES)
    apart = (project(numbers).double() - wanted).abs()
    assert (apart <= project.errors * length[:, None]).all()
    # Of two digits each entry is off by at most a 64,516th of the largest.
    entry = principal.abs().amax(1) / 64_516
    assert (project.errors <= 2**-20 + 1.001 * math.sqrt(dim) * entry).all()
    assert apart.max() < 3e-5 * length.max()


def test_bytes_and_floats_agree_where_floats_are_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    principal, numbers, mean = directions_of(24, 192), pixels_of(50, 192), torch.linspace(-0.2, 0.1, 192)
    x = centred(numbers.float(), BYTES, mean)
    by_default = Projection(mean, principal, BYTES)(numbers, x)
    monkeypatch.setattr(integers, "factor_levels", lambda: 0)
    by_floats = Projection(mean, principal, BYTES)(numbers, x)
    torch.testing.assert_close(by_default, by_floats, rtol=0, atol=2e-3)
    assert torch.equal(by_floats, x @ principal.T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_latents_are_projected_as_floats_and_stay_as_they_are(dtype: torch.dtype) -> None:
    codec = Codec(dtype=dtype, unit=5.5, offset=0.0, reach=40.0)
    principal, mean = directions_of(6, 64), torch.linspace(-1, 1, 64)
    numbers = (5 * torch.randn(9, 64, generator=torch.Generator().manual_seed(0))).to(dtype)
    before = numbers.clone()
    project = Projection(mean, principal, codec)
    wanted, length = exactly(numbers, mean, principal, codec)
    assert ((project(numbers).double() - wanted).norm(dim=1) <= 1e-6 * length).all()
    assert torch.equal(numbers, before)
