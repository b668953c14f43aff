"""Budgets in words, and the rows that fit in them."""

from pathlib import Path

import pytest
from refusals import refused

from nnflow import memory as module
from nnflow.errors import InputError
from nnflow.memory import format_bytes, machine_memory, parse_bytes, rows_within, working_memory


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2_147_483_648),
        ("2GB", 2_000_000_000),
        ("512M", 536_870_912),
        ("512m", 536_870_912),
        (" 16 G ", 17_179_869_184),
        ("1.5k", 1536),
        ("1.5kB", 1500),
        ("3TB", 3_000_000_000_000),
        ("4096", 4096),
        ("4096b", 4096),
        (4096, 4096),
    ],
)
def test_sizes_in_words(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "G", "lots", "-1", "0", "0G", "0.0001", "1e9", "nan", "inf", "2 X", "1G2", "9" * 400, "9e9T"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with refused(InputError, "memory budget"):
        parse_bytes(text)


def test_sizes_for_people() -> None:
    sizes = [0, 1023, 1024, 1536, 3 * 2**20, 5 * 2**30, 2**41, 2**51]
    wanted = ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "3.0 MiB", "5.0 GiB", "2.0 TiB", "2048.0 TiB"]
    assert [format_bytes(size) for size in sizes] == wanted


def test_rows_fill_the_budget_and_never_exceed_it() -> None:
    assert rows_within(100, 10, at_most=1000) == 10
    assert rows_within(99, 10, at_most=1000) == 9
    assert rows_within(100, 10, at_most=3) == 3
    assert rows_within(10, 10, at_most=1000) == 1
    assert rows_within(100, 10, at_most=1000, share=3) == 3
    assert rows_within(10, 10, at_most=0) == 1  # an empty batch has blocks of one row, not of none
    with refused(InputError, "9 B is too small: one row of the scores takes 10 B"):
        rows_within(9, 10, at_most=1000, what="scores")
    with refused(InputError, "29 B is too small: one row of the block takes 10 B .*1/3.* at least 30 B"):
        rows_within(29, 10, at_most=1000, share=3)


def test_working_memory_is_what_the_libraries_leave() -> None:
    assert working_memory(2 << 30) == (2 << 30) - (400 << 20)
    assert working_memory(400 << 20) == 100 << 20
    assert working_memory(8) == 2


def test_a_control_group_limits_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = machine_memory()
    assert 1 << 28 < whole < 1 << 50
    monkeypatch.setattr(module, "Path", lambda _, name: tmp_path / name)
    assert machine_memory() >= whole
    (tmp_path / "memory.max").write_text("max\n")
    assert machine_memory() >= whole
    (tmp_path / "memory.max").write_text("1234567\n")
    assert machine_memory() == 1_234_567
