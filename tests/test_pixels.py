"""PixelRows: bytes read as exact floats, block by block."""

import gc

import pytest
import torch
from refusals import refused
from torch.utils._python_dispatch import TorchDispatchMode

from nnflow import pixels as module
from nnflow.errors import InputError
from nnflow.pixels import PixelRows, moved

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


@pytest.mark.parametrize(("dim", "rows"), [(3_072, 1024), (12_288, 256), (1_000_000, 64)])
def test_blocks_that_are_passed_over_stay_in_the_caches(dim: int, rows: int) -> None:
    wide = PixelRows(torch.empty(1, dim, dtype=torch.uint8))
    assert wide.cached_rows(1 << 40) == rows
    assert wide.cached_rows(4 * 7 * 4 * dim) == 7


def test_blocks_of_any_size_are_all_rows_in_order(pixels: torch.Tensor) -> None:
    for rows in (1, 6, N, 100, None):
        blocks = list(PixelRows(pixels).blocks(1 << 20, 2, rows=rows))
        assert [start for start, _, _ in blocks] == list(range(2, N, rows or 1024))
        assert [stop for _, stop, _ in blocks[:-1]] == [start for start, _, _ in blocks[1:]]
        assert blocks[-1][1] == N
    found = [block.clone() for _, _, block in PixelRows(pixels).blocks(1 << 20, 2, rows=6)]
    assert torch.equal(torch.cat(found), pixels[2:].float())


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


@pytest.mark.parametrize(
    ("machine", "budget", "reads"),
    [
        (4 * N * D, None, 0),
        (4 * N * D - 1, None, 1),
        (4 * N * D - 1, 4 * N * D, 0),
        (1 << 40, 4 * N * D - 1, 1),
    ],
)
def test_a_store_is_read_where_its_map_would_fill_memory(
    pixels: torch.Tensor, machine: int, budget: int | None, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def read(rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        seen.append(len(ids))
        return rows[ids]

    monkeypatch.setattr(module, "machine_memory", lambda: machine)
    monkeypatch.setattr(module, "rows_at", read)
    ids = torch.tensor([22, 0, 0, 7])
    assert torch.equal(PixelRows(pixels).gather(ids, budget), pixels[ids])
    assert seen == [4] * reads


@pytest.mark.parametrize("block", [1, 5, 22, 23, 24])
def test_squared_norms_are_exact_at_any_block_size(pixels: torch.Tensor, block: int) -> None:
    norms = PixelRows(pixels).squared_norms(4 * block * 4 * D)
    # in integers: sum (2 p - 255)^2 / 255^2
    wanted = [sum((2 * p - 255) ** 2 for p in image) / 255**2 for image in pixels.tolist()]
    assert norms.dtype == torch.float64
    torch.testing.assert_close(norms, torch.tensor(wanted, dtype=torch.float64), rtol=1e-14, atol=0)
    assert norms[3] == norms[4] == D


META = torch.device("meta")


class Travels(TorchDispatchMode):
    """Notes the type of what goes from the CPU to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        target = kwargs.get("device") or (args[0].device if "copy_" in str(function) else None)
        source = args[1] if str(function).startswith("aten.copy_") else args[0] if args else None
        if (
            target is not None
            and isinstance(source, torch.Tensor)
            and source.device.type == "cpu" != str(target)
        ):
            self.seen.append(source.dtype)
        return function(*args, **kwargs)


def test_rows_travel_to_another_device_as_bytes(pixels: torch.Tensor) -> None:
    """A copy of bytes into floats would make floats of them here, and send four times as much."""
    rows = PixelRows(pixels, META)
    with Travels() as travels:
        read = rows.read(2, 9, rows.new_block(8))
        gathered = rows.gather(torch.tensor([3, 1]))
    assert (read.device, read.dtype, read.shape) == (META, torch.float32, (7, D))
    assert (gathered.device, gathered.dtype, gathered.shape) == (META, torch.uint8, (2, D))
    assert travels.seen == [torch.uint8, torch.uint8]


def test_rows_for_a_gpu_are_pinned_first(pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, told = PixelRows(pixels), []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        told.append("pinned")
        return tensor.clone()

    def to(tensor: torch.Tensor, device: torch.device, *, non_blocking: bool) -> torch.Tensor:
        told.append((tensor.dtype, device.type, non_blocking, tensor.data_ptr() != pixels[2:].data_ptr()))
        return tensor

    rows.device = torch.device("cuda")
    block = torch.empty(4, D)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    read = rows.read(2, 5, block)
    monkeypatch.undo()
    assert told == ["pinned", (torch.uint8, "cuda", True, True)]
    assert torch.equal(read.byte(), pixels[2:5])


def test_one_copy_on_a_device_while_anyone_holds_it(pixels: torch.Tensor) -> None:
    first = moved(pixels, META)
    assert moved(pixels, torch.device("meta")) is first
    assert moved(pixels[1:], META) is not first
    assert moved(pixels.clone(), META) is not first
    assert len(module._copies) == 1
    del first
    gc.collect()
    assert len(module._copies) == 0
