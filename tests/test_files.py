"""Files whole or absent, whatever interrupts; one builder a folder; names safe to show."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from refusals import refused

from nnflow.errors import BusyError, StoreError
from nnflow.files import disk_errors, file_mark, folder_lock, read_json, shown, whole_file, write_json


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`code` in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_names_are_shown_without_what_moves_a_terminal() -> None:
    assert shown("plain é 猫 name.png") == "plain é 猫 name.png"
    assert shown("a\nb\x1b[31m\udc80\u202e\u2028") == r"a\nb\x1b[31m\udc80\u202e\u2028"
    assert shown(Path("x") / "y\r") == "x/y\\r"
    everything = "".join(map(chr, [*range(0x3000), *range(0xD7F0, 0xE010), 0x1F600, 0xE0001]))
    assert shown(everything).isprintable()


def test_a_whole_file_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with whole_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert left_in(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail_half_way() -> None:
        with whole_file(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(error):
        fail_half_way()
    assert path.read_text() == "old"
    assert left_in(tmp_path) == ["file"]


def test_killed_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    code = """
import os, sys
from pathlib import Path
from nnflow.files import whole_file
with whole_file(Path(sys.argv[1])) as partial:
    partial.write_text("half")
    os.kill(os.getpid(), 9)
"""
    assert run(code, path).returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    with whole_file(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new"
    assert left_in(tmp_path) == ["file"]


def test_a_full_disk_is_said_and_keeps_the_old_file(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the write fails half-way, as there."""
    path = tmp_path / "file"
    path.write_text("old")
    code = """
import resource, sys
from pathlib import Path
from nnflow.errors import StoreError
from nnflow.files import whole_file
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with whole_file(Path(sys.argv[1])) as partial:
        partial.write_bytes(bytes(8192))
except StoreError as error:
    print(error)
"""
    done = run(code, path)
    assert done.stdout.count("\n") == 1, done
    assert done.stdout.startswith(f"writing {path}: file too large")
    assert path.read_text() == "old"
    assert left_in(tmp_path) == ["file"]


def test_nowhere_to_write_is_said(tmp_path: Path) -> None:
    with refused(StoreError, "no such file"), whole_file(tmp_path / "absent" / "file") as partial:
        partial.write_text("new")
    (tmp_path / "file").write_text("a file")
    with refused(StoreError, "a file stands where a folder was wanted"):
        write_json(tmp_path / "file" / "deeper", {})
    with refused(StoreError, "a file stands where a folder was wanted"), folder_lock(tmp_path / "file"):
        pass


@pytest.mark.parametrize(
    ("number", "fix"), [(28, "free space"), (122, "quota"), (13, "you may write to"), (30, "writable disk")]
)
def test_what_the_system_refuses_is_said_with_a_fix(number: int, fix: str) -> None:
    with refused(StoreError, rf"building x\\n: .*; .*{fix}"), disk_errors(Path("x\n"), "building"):
        raise OSError(number, os.strerror(number))


def test_json_round_trip_and_refusal_of_what_json_has_not(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    value = {"text": "é\n\udc80", "numbers": [1, 2.5, None], "deep": {"true": True}}
    write_json(path, value)
    assert read_json(path, "a value") == value
    assert path.read_bytes().isascii()
    with pytest.raises(ValueError, match="nan"):
        write_json(path, {"bad": float("nan")})
    assert read_json(path, "a value") == value
    assert left_in(tmp_path) == ["value.json"]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "not readable as a thing"),
        (b'{"a": 1', "not readable as a thing"),
        (b"\xff\xfe", "not readable as a thing"),
        (b"[" * 100_000, "not readable as a thing"),
        (b"[1, 2]", "got a list"),
        (b"null", "got a NoneType"),
    ],
)
def test_what_is_no_object_is_refused(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "x\n.json"
    path.write_bytes(content)
    with refused(StoreError, rf"x\\n\.json: .*{match}"):
        read_json(path, "a thing")


def test_json_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with refused(StoreError, "no such file; wanted a thing"):
        read_json(tmp_path / "absent", "a thing")
    with refused(StoreError, "not readable as a thing"):
        read_json(tmp_path, "a thing")


_TRY = """
import sys
from pathlib import Path
from nnflow.errors import BusyError
from nnflow.files import folder_lock
try:
    with folder_lock(Path(sys.argv[1])):
        print("free")
except BusyError as error:
    print(error)
"""


def test_one_process_holds_a_folder_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with folder_lock(folder):
        assert run(_TRY, folder).stdout == (
            f"{folder}: another process is building here; wait for it or name another folder\n"
        )
        with refused(BusyError, "another process"), folder_lock(folder):
            pass
    assert run(_TRY, folder).stdout == "free\n"
    with pytest.raises(ValueError, match="mine"), folder_lock(folder):
        raise ValueError("mine")
    with folder_lock(folder):
        pass


def test_a_killed_builder_frees_its_folder(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from nnflow.files import folder_lock
with folder_lock(Path(sys.argv[1])):
    Path(sys.argv[2]).touch()
    time.sleep(60)
"""
    held = tmp_path / "held"
    builder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(held)])
    try:
        for _ in range(600):
            if held.exists():
                break
            time.sleep(0.05)
        with refused(BusyError, "another process"), folder_lock(tmp_path):
            pass
    finally:
        builder.kill()
        builder.wait()
    with folder_lock(tmp_path):
        pass


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 5000, 2_000_000])
def test_a_mark_notices_any_change_of_a_small_file(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    content = bytearray(os.urandom(size))
    path.write_bytes(content)
    mark = file_mark(path)
    assert file_mark(path) == mark == json.loads(json.dumps(mark))
    assert mark["bytes"] == size
    for place in {0, size // 3, size // 2, size - 1} if size else ():
        content[place] ^= 1
        path.write_bytes(content)
        assert file_mark(path) != mark, place
        content[place] ^= 1
    for other in (bytes(content) + b"\0", bytes(content[:-1])):
        path.write_bytes(other)
        assert (file_mark(path) == mark) == (other == content)


def test_a_mark_of_a_large_file_notices_its_ends_and_any_hole(tmp_path: Path) -> None:
    size, page = 8 << 20, 1 << 12
    path = tmp_path / "file"
    content = bytearray(os.urandom(size))
    path.write_bytes(content)
    mark = file_mark(path)
    for place in (0, (1 << 20) - 1, size - (1 << 20), size - 1):
        with path.open("r+b") as file:
            os.pwrite(file.fileno(), bytes([content[place] ^ 1]), place)
        assert file_mark(path) != mark, place
        path.write_bytes(content)
    for start in range(1 << 20, 7 << 20, 1_234_567):  # a hole as wide as the way from probe to probe
        with path.open("r+b") as file:
            os.pwrite(file.fileno(), bytes(size // 64 + page), start)
        assert file_mark(path) != mark, start
        path.write_bytes(content)
    assert file_mark(path) == mark
