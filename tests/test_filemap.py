"""Files as tensors: what they hold, and that letting their pages go gives memory back and changes nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nnflow.filemap import let_go, mapped
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
