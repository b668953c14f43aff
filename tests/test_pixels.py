"""PixelRows: bytes read as exact floats, block by block."""

import pytest
import torch
from refusals import refused

from nnflow.errors import InputError
from nnflow.pixels import HALF_RANGE, PixelRows

N, D = 23, 10


@pytest.fixture
def pixels() -> torch.Tensor:
    values = torch.arange(N * D).reshape(N, D) * 37 % 256
    values[3], values[4] = 0, 255
    return values.to(torch.uint8)


def test_a_block_takes_a_quarter_of_the_budget(pixels: torch.Tensor) -> None:
    rows = PixelRows(pixels)
    assert rows.block_rows(4 * 7 * 4 * D) == 7
    assert rows.block_rows(4 * 7 * 4 * D - 1) == 6
    assert rows.block_rows(1 << 40) == 1024
    with refused(InputError, r"budget of 159 B is too small: .* takes 40 B .* give at least 160 B"):
        rows.block_rows(4 * 4 * D - 1)


def test_what_is_read_are_the_bytes_themselves(pixels: torch.Tensor) -> None:
    rows, before = PixelRows(pixels), pixels.clone()
    block = rows.new_block(6)
    for start, stop in [(0, 6), (6, 12), (20, 23), (5, 6)]:
        read = rows.read(start, stop, block)
        assert read.tolist() == pixels[start:stop].tolist()
        assert read.data_ptr() == block.data_ptr(), "a stream allocates once"
        read.zero_()
    assert torch.equal(pixels, before)


def test_rows_are_gathered_by_number(pixels: torch.Tensor) -> None:
    ids = torch.tensor([22, 0, 0, 7])
    gathered = PixelRows(pixels).gather(ids)
    assert torch.equal(gathered, pixels[ids])
    assert gathered.dtype == torch.uint8


@pytest.mark.parametrize("block", [1, 5, 22, 23, 24])
def test_squared_norms_are_exact_at_any_block_size(pixels: torch.Tensor, block: int) -> None:
    norms = PixelRows(pixels).squared_norms(4 * block * 4 * D)
    # in integers: sum (2 p - 255)^2 / 255^2
    wanted = [sum((2 * p - 255) ** 2 for p in image) / 255**2 for image in pixels.tolist()]
    assert norms.dtype == torch.float64
    torch.testing.assert_close(norms, torch.tensor(wanted, dtype=torch.float64), rtol=1e-14, atol=0)
    assert norms[3] == norms[4] == D
    assert HALF_RANGE == 255 / 2
