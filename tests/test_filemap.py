"""Files as tensors: what they hold, and that letting their pages go gives memory back and changes nothing."""

import gc
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import refused

from nnflow.errors import StoreError
from nnflow.filemap import let_go, mapped, rows_at
from nnflow.pixels import PixelRows

ROWS, WIDTH, OFFSET = 1 << 14, 1 << 11, 1234  # 32 MiB
MIB = 1 << 20


def resident() -> int:
    """Bytes of mapped files in this process."""
    line = next(line for line in Path("/proc/self/status").read_text().split("\n") if "RssFile" in line)
    return int(line.split()[1]) << 10


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("map") / "file"
    numbers = np.arange(ROWS * WIDTH // 4, dtype="<u4")
    path.write_bytes(b"x" * OFFSET + numbers.tobytes() + b"end")
    return path


def whole(rows: torch.Tensor) -> bool:
    held = np.frombuffer(rows.numpy().tobytes(), "<u4")
    return bool((held == np.arange(len(held), dtype="<u4")).all())


def test_a_map_is_the_bytes_of_the_file(path: Path) -> None:
    rows = mapped(path, OFFSET, (ROWS, WIDTH))
    assert rows.shape == (ROWS, WIDTH)
    assert whole(rows)


def test_pages_go_and_come_back(path: Path) -> None:
    rows = mapped(path, OFFSET, (ROWS, WIDTH))
    before = resident()
    assert whole(rows)
    assert resident() - before > 30 * MIB
    let_go(rows)
    assert resident() - before < 2 * MIB
    assert whole(rows)
    half = resident()
    let_go(rows[ROWS // 2 :])
    assert 12 * MIB < half - resident() < 24 * MIB
    assert whole(rows)


def test_memory_that_is_no_map_of_ours_is_left_alone(path: Path) -> None:
    """MADV_DONTNEED would fill it with zeros."""
    held = mapped(path, OFFSET, (ROWS, WIDTH))
    for rows in (torch.ones(1 << 22, dtype=torch.uint8), held.clone(), torch.empty(0), held[:0]):
        wanted = rows.clone()
        let_go(rows)
        assert torch.equal(rows, wanted)


def test_an_address_used_again_is_not_taken_for_the_map_it_was(path: Path) -> None:
    from nnflow import filemap

    known = len(filemap._maps)
    rows = mapped(path, OFFSET, (ROWS, WIDTH))
    assert len(filemap._maps) == known + 1
    part = rows[5:6]
    del rows
    assert len(filemap._maps) == known + 1  # a view keeps it
    del part
    assert len(filemap._maps) == known


@pytest.mark.parametrize(("budget", "grows"), [(128 * MIB, True), (127 * MIB, False), (8 * MIB, False)])
def test_a_stream_stays_small_where_the_file_is_larger_than_its_share(
    path: Path, budget: int, grows: bool
) -> None:
    rows = PixelRows(mapped(path, OFFSET, (ROWS, WIDTH)))
    before, highest, total = resident(), 0, 0
    for start, stop, block in rows.blocks(budget):
        assert len(block) == stop - start
        total += len(block)
        highest = max(highest, resident() - before)
    assert total == ROWS
    assert (highest > 30 * MIB) == grows
    assert (highest < 8 * MIB) != grows


def test_a_stream_over_some_rows(path: Path) -> None:
    rows = PixelRows(mapped(path, OFFSET, (ROWS, WIDTH)))
    found = [(start, stop, block.byte()) for start, stop, block in rows.blocks(16 * MIB, 100, 1500)]
    assert [start for start, _, _ in found] == [100, 612, 1124]
    assert found[-1][1] == 1500
    assert torch.equal(torch.cat([block for _, _, block in found]), rows.pixels[100:1500])


def some_ids(count: int) -> torch.Tensor:
    """Unsorted, with both ends and one twice."""
    ids = torch.randint(ROWS, (count,), generator=torch.Generator().manual_seed(count))
    ids[:4] = torch.tensor([ROWS - 1, 0, ROWS - 1, 7])
    return ids


@pytest.mark.parametrize("count", [4, 16, 17, 18, 1000])
def test_rows_read_are_those_of_the_map(path: Path, count: int) -> None:
    rows, ids = mapped(path, OFFSET, (ROWS, WIDTH)), some_ids(count)
    assert torch.equal(rows_at(rows, ids), rows[ids])
    assert torch.equal(rows_at(rows, ids.int()), rows[ids])


def test_no_rows_are_read(path: Path) -> None:
    assert rows_at(mapped(path, OFFSET, (ROWS, WIDTH)), torch.tensor([], dtype=torch.int64)).shape == (
        0,
        WIDTH,
    )


def test_rows_of_a_part_and_of_other_types(path: Path) -> None:
    rows, ids = mapped(path, OFFSET, (ROWS, WIDTH)), torch.tensor([5, 0, 30])
    assert torch.equal(rows_at(rows[100:200], ids), rows[100:200][ids])
    halves = rows.view(torch.int16)
    assert torch.equal(rows_at(halves[3:], ids), halves[3:][ids])


def test_rows_that_are_no_map_are_taken_from_memory() -> None:
    rows = torch.arange(60, dtype=torch.uint8).view(20, 3)
    assert rows_at(rows, torch.tensor([19, 2])).tolist() == [[57, 58, 59], [6, 7, 8]]


def test_rows_read_do_not_become_resident(path: Path) -> None:
    rows, ids = mapped(path, OFFSET, (ROWS, WIDTH)), torch.randperm(ROWS)[:4000]
    rows_at(rows, ids[:20])  # wakes the threads
    before = resident()
    rows_at(rows, ids)
    assert resident() - before < MIB
    rows[ids]
    assert resident() - before > 4000 * WIDTH


@pytest.mark.parametrize("count", [1, 100])
def test_a_file_cut_under_the_map_is_named(tmp_path: Path, count: int) -> None:
    path = tmp_path / "cut"
    path.write_bytes(bytes(200 * 64))
    rows = mapped(path, 0, (200, 64))
    os.truncate(path, 150 * 64 + 10)
    assert rows_at(rows, torch.arange(150)).shape == (150, 64)
    with refused(StoreError, r"cut: 10 of 64 bytes of row 150; it has been cut .*: restore it or build it"):
        rows_at(rows, torch.full((count,), 150))


def test_the_file_is_closed_with_its_map(path: Path) -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    rows = mapped(path, OFFSET, (ROWS, WIDTH))
    part = rows[3:]
    del rows
    assert len(os.listdir("/proc/self/fd")) > before
    assert rows_at(part, torch.tensor([0])).shape == (1, WIDTH)
    del part
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_fork_reads_too(path: Path) -> None:
    """It has none of its parent's threads, and would wait for them for ever."""
    rows, ids = mapped(path, OFFSET, (ROWS, WIDTH)), some_ids(100)
    wanted = rows_at(rows, ids).numpy()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if (rows_at(rows, ids).numpy() == wanted).all() else 1)  # torch.equal may be OpenMP's
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
