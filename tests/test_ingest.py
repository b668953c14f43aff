"""Building images.h5: the same bytes whatever happens on the way, and nothing half-built opens."""

import csv
import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from pictures import class_files, noise, png_chunk, saved, write_tree, write_zip

from nnflow import ingest
from nnflow.errors import BusyError, InputError, SourceError, StoreError
from nnflow.files import folder_lock
from nnflow.ingest import build_images
from nnflow.sources import UnreadableImageError
from nnflow.store import ImageStore

BUILD = """
import os, sys
os.fsync = os.fdatasync = lambda descriptor: None
from nnflow.ingest import build_images
from nnflow import unsealed
from nnflow.files import folder_lock
unsealed._SYNC_SECONDS = 0
source, out, size = sys.argv[1:]
with folder_lock(__import__("pathlib").Path(out)):
    print("started", flush=True)
    build_images(source, out, size=int(size), workers=2)
"""
BUSY = ["images.h5.partial", "images.h5.journal", "images.h5.plan.json"]


def started(source, out, size):
    """A build in a process of its own, once its imports are done."""
    command = [sys.executable, "-c", BUILD, str(source), str(out), str(size)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"started\n"
    return process


def files_in(out):
    return sorted(path.name for path in out.iterdir() if path.name != ".lock")


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """The kernel outlives a killed process: syncing matters for power cuts only, and is slow."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: None)


@pytest.fixture
def source(tmp_path):
    return write_tree(tmp_path / "source", class_files(300))


def test_bytes_do_not_depend_on_workers_time_or_place(tmp_path, source):
    first = build_images(source, tmp_path / "a", size=8, workers=1).read_bytes()
    time.sleep(1.1)  # HDF5 would keep times in seconds
    source = source.rename(tmp_path / "moved")
    for workers in (2, 7, None):
        out = tmp_path / f"out-{workers}"
        assert build_images(source, out, size=8, workers=workers).read_bytes() == first
        assert files_in(out) == ["images.h5"]


def test_pixels_labels_and_paths_belong_together(tmp_path):
    files = class_files(150, classes=("emu", "cat", "dog"))
    store = ImageStore.build(write_tree(tmp_path / "s", files), tmp_path / "out", size=8)
    assert store.shape == (150, 3, 8, 8)
    assert store.classes == ("cat", "dog", "emu")
    assert sorted(store.paths) == sorted(files)
    for row, path in enumerate(store.paths):
        number = int(path[4:8])
        picture = noise(8, 8, seed=(0, number)).transpose(2, 0, 1)
        np.testing.assert_array_equal(store.pixels[row].numpy(), picture.ravel())
        assert store.classes[store.labels[row]] == path.split("/")[0]


def test_folder_and_zip_give_the_same_images(tmp_path, source):
    archive = write_zip(tmp_path / "s.zip", class_files(300))
    one = ImageStore.build(source, tmp_path / "one", size=8)
    two = ImageStore.build(archive, tmp_path / "two", size=8)
    assert one.fingerprint == two.fingerprint
    assert list(one.paths) == list(two.paths)


def test_rows_larger_than_a_task_and_grey(tmp_path):
    files = {f"{i}.png": saved(noise(900, 900, seed=i)) for i in range(3)}
    store = ImageStore.build(write_tree(tmp_path / "s", files), tmp_path / "o", size=900, workers=2)
    for i in range(3):
        got = store.pixels[i].reshape(3, 900, 900).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(got, noise(900, 900, seed=i))
    grey = ImageStore.build(tmp_path / "s", tmp_path / "grey", size=10, grey=True)
    assert grey.shape == (3, 1, 10, 10)
    assert grey.classes == ()
    assert (grey.labels == -1).all()


@pytest.fixture(scope="module")
def slow_source(tmp_path_factory):
    """400 larger images: about a second of work for two threads."""
    some = [saved(noise(250, 250, seed=i), compress_level=1) for i in range(8)]
    files = {f"{'abcd'[i % 4]}/{i:03d}.png": some[i * 7 % 8] for i in range(400)}
    return write_zip(tmp_path_factory.mktemp("slow") / "slow.zip", files)


def test_killed_at_20_random_moments_it_ends_with_the_same_bytes(tmp_path, slow_source):
    build_images(slow_source, tmp_path / "whole", size=64, workers=2)
    undisturbed = (tmp_path / "whole/images.h5").read_bytes()
    out = tmp_path / "killed"
    random = np.random.default_rng(20)
    progress = []
    for _ in range(20):
        process = started(slow_source, out, 64)
        time.sleep(random.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if (out / "images.h5").exists():  # a fast machine: the next moments hit another build
            assert (out / "images.h5").read_bytes() == undisturbed
            (out / "images.h5").unlink()
        elif (out / "images.h5.plan.json").exists():
            progress.append((out / "images.h5.journal").read_bytes().count(1))
        with pytest.raises(StoreError):
            ImageStore.open(out)
    assert any(0 < done < 400 for done in progress), progress
    assert build_images(slow_source, out, size=64, workers=2).read_bytes() == undisturbed
    assert files_in(out) == ["images.h5"]


CRASHES = """
import os, sys, shutil
from pathlib import Path
from nnflow import hdf5file, ingest, unsealed

source, whole, out = map(Path, sys.argv[1:4])
skip = sys.argv[4] == "skip"
unsealed._SYNC_SECONDS = 0
os.fsync = os.fdatasync = lambda descriptor: None  # the kernel outlives a killed process
wanted = whole.read_bytes()

def build():
    return ingest.build_images(source, out, size=8, workers=1, skip_unreadable=skip)

def crash_at(moment):
    calls = 0
    def dying(call):
        def counted(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == moment:
                os._exit(9)
            return call(*arguments, **options)
        return counted
    for name in ("fsync", "fdatasync", "pwrite", "posix_fallocate", "replace", "unlink", "open"):
        setattr(os, name, dying(getattr(os, name)))
    hdf5file.create = dying(hdf5file.create)
    hdf5file._contiguous = dying(hdf5file._contiguous)
    build()
    os._exit(0)

moment = 0
while True:
    moment += 1
    shutil.rmtree(out, ignore_errors=True)
    if (child := os.fork()) == 0:
        try:
            crash_at(moment)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), (moment, code)
    if (out / "images.h5").exists():
        assert (out / "images.h5").read_bytes() == wanted, moment
    assert build().read_bytes() == wanted, moment
    left = sorted(os.listdir(out))
    assert left == (["images.h5", "skipped.csv"] if skip else ["images.h5"]), (moment, left)
    if code == 0:
        break
print(moment - 1)
"""


@pytest.mark.parametrize("skip", ["skip", "stop"])
def test_killed_before_every_single_write_it_ends_with_the_same_bytes(tmp_path, skip):
    files = class_files(60)
    if skip == "skip":
        files["cat/0003.png"] = b"not an image"
    source = write_tree(tmp_path / "source", files)
    whole = build_images(source, tmp_path / "whole", size=8, skip_unreadable=skip == "skip")
    command = [sys.executable, "-c", CRASHES, str(source), str(whole), str(tmp_path / "out"), skip]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30  # moments


def test_what_a_killed_build_decoded_is_not_decoded_again(tmp_path, source, monkeypatch):
    monkeypatch.setattr(ingest, "_CHUNK_ITEMS", 10)
    seen = []
    real = ingest.Decoder.decode

    def interrupted(self, content, path):
        if len(seen) == 105:
            raise KeyboardInterrupt
        seen.append(path)
        return real(self, content, path)

    monkeypatch.setattr(ingest.Decoder, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_images(source, tmp_path / "out", size=8, workers=1)
    assert files_in(tmp_path / "out") == sorted(BUSY)
    assert (tmp_path / "out/images.h5.journal").read_bytes() == b"\1" * 100 + bytes(200)
    again = []

    def counted(self, content, path):
        again.append(path)
        return real(self, content, path)

    monkeypatch.setattr(ingest.Decoder, "decode", counted)
    resumed = build_images(source, tmp_path / "out", size=8, workers=2).read_bytes()
    assert set(again) == {item for item in again if item not in seen[:100]}
    assert len(again) == 200
    assert resumed == build_images(source, tmp_path / "whole", size=8).read_bytes()
    again.clear()
    build_images(source, tmp_path / "out", size=8)
    assert again == []  # finished: reused without decoding


def test_the_journal_is_never_ahead_of_the_rows(tmp_path, source, monkeypatch):
    """The rows a mark stands for have been synced before the mark is written."""
    events = []

    def watched(name, real):
        def call(descriptor, *rest):
            if threading.current_thread() is threading.main_thread():
                file = os.readlink(f"/proc/self/fd/{descriptor}")
                events.append((name, os.path.basename(file)))
            return real(descriptor, *rest)

        return call

    for name in ("fdatasync", "pwrite"):
        monkeypatch.setattr(os, name, watched(name, getattr(os, name)))
    monkeypatch.setattr("nnflow.unsealed._SYNC_SECONDS", 0)
    build_images(source, tmp_path / "out", size=8, workers=1)
    marks = [i for i, event in enumerate(events) if event == ("pwrite", "images.h5.journal")]
    assert len(marks) >= 3
    for mark in marks:
        assert events[mark - 1] == ("fdatasync", "images.h5.partial")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": 9}, "size 8, asked for 9"),
        ({"grey": True}, "grey False, asked for True"),
        ({"background": "black"}, "background #ffffff, asked for #000000"),
    ],
)
def test_other_parameters_for_the_same_out_are_refused(tmp_path, source, change, words):
    whole = build_images(source, tmp_path / "out", size=8)
    before = whole.read_bytes()
    with pytest.raises(StoreError, match=words) as error:
        build_images(source, tmp_path / "out", **{"size": 8, **change})
    assert "name another OUT" in str(error.value)
    assert str(error.value).isprintable()
    assert whole.read_bytes() == before
    build_images(source, tmp_path / "out", size=8, background="#fff", workers=1)


def test_another_source_for_the_same_out_is_refused_finished_or_not(tmp_path, source):
    fewer = write_tree(tmp_path / "fewer", class_files(299))
    other = write_tree(tmp_path / "other", class_files(300, seed=1))
    out = tmp_path / "out"
    (source / "cat/0003.png").write_bytes(b"")
    for finished in (False, True):
        if finished:
            build_images(source, out, size=8, skip_unreadable=True)
        else:
            with pytest.raises(UnreadableImageError):
                build_images(source, out, size=8)
        for wrong, value in ((fewer, "300, asked for 299"), (other, "digest of its listing")):
            with pytest.raises(StoreError, match=value):
                build_images(wrong, out, size=8, skip_unreadable=True)
        with pytest.raises(StoreError, match="size 8, asked for 16"):
            build_images(source, out, size=16)


def test_the_first_unreadable_image_stops_the_build_and_the_rest_is_kept(tmp_path):
    files = class_files(300)
    broken = {"cat/0150.png": b"", "dog/0001.png": files["dog/0001.png"][:60]}
    source = write_tree(tmp_path / "s", {**files, **broken})
    out = tmp_path / "out"
    for workers in (1, 4):
        with pytest.raises(UnreadableImageError) as error:
            build_images(source, out, size=8, workers=workers)
        assert error.value.path == "cat/0150.png"  # the first in order, whoever finished first
        assert "empty file; pass --skip-unreadable" in str(error.value)
        assert str(error.value).isprintable()
        with pytest.raises(StoreError, match="not finished"):
            ImageStore.open(out)
    assert (out / "images.h5.journal").read_bytes().count(1) > 60

    store = ImageStore.build(source, out, size=8, skip_unreadable=True)
    assert list(store.paths) == sorted(path for path in files if path not in broken)
    for row, path in enumerate(store.paths):
        picture = noise(8, 8, seed=(0, int(path[4:8]))).transpose(2, 0, 1)
        np.testing.assert_array_equal(store.pixels[row].numpy(), picture.ravel())
    with (out / "skipped.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["path", "reason"]
    assert [row[0] for row in rows] == sorted(broken)
    assert rows[0][1] == "an empty file"
    assert files_in(out) == ["images.h5", "skipped.csv"]
    straight = build_images(source, tmp_path / "two", size=8, skip_unreadable=True, workers=1)
    assert straight.read_bytes() == (out / "images.h5").read_bytes()
    assert len(ImageStore.build(source, out, size=8, skip_unreadable=True)) == 298
    with pytest.raises(SourceError, match="without 2 unreadable images"):
        build_images(source, out, size=8)


def test_what_other_threads_finished_before_an_error_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, "_CHUNK_ITEMS", 8)
    real, last = ingest.Decoder.decode, threading.Event()

    def decode(self, content, path):
        if path == "00.png":
            assert last.wait(30)
        elif path == "23.png":
            last.set()
        return real(self, content, path)

    monkeypatch.setattr(ingest.Decoder, "decode", decode)
    files = {f"{i:02d}.png": saved(noise(8, 8, seed=i)) if i else b"" for i in range(24)}
    with pytest.raises(UnreadableImageError):
        build_images(write_tree(tmp_path / "s", files), tmp_path / "out", size=8, workers=2)
    assert (tmp_path / "out/images.h5.journal").read_bytes() == b"\0" + b"\1" * 23


def test_a_class_without_readable_images_is_gone(tmp_path):
    files = class_files(9)
    files.update({path: b"" for path in files if path.startswith("cat/")})
    source = write_tree(tmp_path / "s", files)
    store = ImageStore.build(source, tmp_path / "out", size=8, skip_unreadable=True)
    assert store.classes == ("dog", "emu")
    assert store.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_skipped_csv_is_safe_to_open(tmp_path):
    odd = os.fsdecode(b'=cmd|"x",\n\xff.png')
    names = [odd, "+1.png", "-1.png", "@a.png", "plain, really.png"]
    source = write_tree(tmp_path / "s", {**dict.fromkeys(names, b""), "good.png": saved(noise(8, 8))})
    build_images(source, tmp_path / "out", size=8, skip_unreadable=True)
    text = (tmp_path / "out/skipped.csv").read_text(encoding="ascii")
    assert text.count("\n") == 6
    with (tmp_path / "out/skipped.csv").open(newline="") as file:
        cells = [row[0] for row in csv.reader(file)][1:]
    assert cells == [
        "'+1.png",
        "'-1.png",
        '\'=cmd|"x",\\n\\udcff.png',
        "'@a.png",
        "plain, really.png",
    ]


def test_all_unreadable(tmp_path):
    source = write_tree(tmp_path / "s", dict.fromkeys(class_files(5), b"x"))
    with pytest.raises(SourceError, match=r"none of the 5 images.*cat/0000\.png"):
        build_images(source, tmp_path / "out", size=8, skip_unreadable=True)
    with pytest.raises(StoreError):
        ImageStore.open(tmp_path / "out")


def test_one_bomb_among_many(tmp_path):
    head = (60_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    bomb = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + png_chunk(b"IDAT", b"")
    source = write_tree(tmp_path / "s", {**class_files(20), "cat/bomb.png": bomb})
    with pytest.raises(UnreadableImageError, match=r"cat/bomb\.png: 60000 x 60000 pixels"):
        build_images(source, tmp_path / "out", size=8)


def test_strange_names_survive_storage(tmp_path):
    odd = os.fsdecode(b"new\nline \xff\x1b[31m")
    names = (f"{odd}/{odd}.png", "b/ü.png")
    source = write_tree(tmp_path / "s", dict.fromkeys(names, saved(noise(8, 8))))
    store = ImageStore.build(source, tmp_path / "out", size=8)
    assert store.classes == ("b", odd)
    assert list(store.paths) == ["b/ü.png", f"{odd}/{odd}.png"]


def test_a_second_build_of_the_same_out_is_refused(tmp_path, slow_source):
    out = tmp_path / "out"
    process = started(slow_source, out, 64)
    try:
        with pytest.raises(BusyError, match="another process is building here"):
            ImageStore.build(slow_source, out, size=64)
    finally:
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    whole = build_images(slow_source, tmp_path / "whole", size=64)
    assert whole.read_bytes() == (out / "images.h5").read_bytes()


def test_threads_of_one_process_exclude_each_other_too(tmp_path, source):
    with folder_lock(tmp_path / "out"):
        thread_errors = []

        def other():
            try:
                ImageStore.build(source, tmp_path / "out", size=8)
            except BusyError as error:
                thread_errors.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert len(thread_errors) == 1
        build_images(source, tmp_path / "out", size=8)  # the holder of the lock builds


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_too_small_is_told_before_anything_is_decoded(tmp_path, source, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StoreError, match="no space left on device; free space") as error:
        build_images(source, tmp_path / "out", size=8)
    assert str(error.value).isprintable()
    assert files_in(tmp_path / "out") == []  # its room is given back


def test_a_disk_that_fills_midway_loses_nothing(tmp_path, source, monkeypatch):
    real, calls = os.pwrite, []

    def filling(descriptor, content, offset):
        if len(content) < 1000:  # the journal
            return real(descriptor, content, offset)
        calls.append(offset)
        if len(calls) == 3:  # takes a part first, as disks do
            return real(descriptor, content[:1000], offset)
        return full() if len(calls) > 3 else real(descriptor, content, offset)

    monkeypatch.setattr(ingest, "_CHUNK_ITEMS", 64)
    monkeypatch.setattr(os, "pwrite", filling)
    with pytest.raises(StoreError, match="what is built so far is kept"):
        build_images(source, tmp_path / "out", size=8, workers=1)
    monkeypatch.setattr(os, "pwrite", real)
    assert (tmp_path / "out/images.h5.journal").read_bytes()[:128] == b"\1" * 128
    assert (tmp_path / "out/images.h5.journal").read_bytes()[128:192] == bytes(64)
    resumed = build_images(source, tmp_path / "out", size=8)
    assert resumed.read_bytes() == build_images(source, tmp_path / "w", size=8).read_bytes()


def test_writes_that_take_only_a_part_are_gone_on_with(tmp_path, source, monkeypatch):
    whole = build_images(source, tmp_path / "whole", size=8).read_bytes()
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: real(file, data[:1000], at))
    assert build_images(source, tmp_path / "out", size=8).read_bytes() == whole


@pytest.mark.parametrize("limit", [0, 100, 5_000, 20_000, 60_000])
def test_a_limit_on_file_size_is_one_line(tmp_path, source, limit):
    """The kernel's own refusal, also in the midst of HDF5's writing; then without the limit."""
    out = tmp_path / "out"
    code = BUILD.replace("    build_images", "    from nnflow.errors import StoreError\n    build_images")
    process = subprocess.run(
        [sys.executable, "-c", code, str(source), str(out), "8"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert process.returncode == 1
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith("nnflow.errors.StoreError: building in"), process.stderr
    resumed = build_images(source, out, size=8)
    assert resumed.read_bytes() == build_images(source, tmp_path / "w", size=8).read_bytes()


def test_file_systems_that_cannot_reserve_are_served(tmp_path, source, monkeypatch):
    def refused(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", refused)
    assert len(ImageStore.build(source, tmp_path / "out", size=8)) == 300


def test_an_out_that_cannot_be_written(tmp_path, source):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(StoreError, match="a file stands where a folder was wanted"):
            ImageStore.build(source, out, size=8)


def test_leftovers_that_do_not_fit_are_started_anew(tmp_path, source):
    whole = build_images(source, tmp_path / "whole", size=8).read_bytes()
    (source / "cat/0000.png").rename(tmp_path / "aside")
    (source / "cat/0000.png").write_bytes(b"")
    for broken in BUSY:
        out = tmp_path / f"out-{broken}"
        with pytest.raises(UnreadableImageError):
            build_images(source, out, size=8)
        content = (out / broken).read_bytes()
        if broken == "images.h5.plan.json":
            (out / broken).unlink()
        else:
            (out / broken).write_bytes(content[: len(content) // 2])
        assert len(ImageStore.build(source, out, size=8, skip_unreadable=True)) == 299
    assert whole == (tmp_path / "whole/images.h5").read_bytes()


def test_foreign_files_in_out_are_not_overwritten(tmp_path, source):
    out = write_tree(tmp_path / "out", {"images.h5": b"mine"})
    with pytest.raises(StoreError, match="foreign"):
        build_images(source, out, size=8)
    assert (out / "images.h5").read_bytes() == b"mine"
    write_tree(tmp_path / "plan", {"images.h5.plan.json": b'{"a": 1}'})
    with pytest.raises(StoreError, match="not a plan"):
        build_images(source, tmp_path / "plan", size=8)


def test_parameters(tmp_path, source):
    for wrong in ({"size": 0}, {"size": 8, "workers": 0}, {"size": 8, "background": "?"}):
        with pytest.raises(InputError):
            build_images(source, tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SourceError):
        build_images(tmp_path / "nothing", tmp_path / "out", size=8)
    assert not (tmp_path / "out").exists()


def test_progress_goes_to_stderr_and_counts_what_was_done(tmp_path, source, capsys):
    build_images(source, tmp_path / "out", size=8, progress=True)
    shown = capsys.readouterr()
    assert "ingest: 100%" in shown.err
    assert "300/300" in shown.err
    assert shown.out == ""
    build_images(source, tmp_path / "quiet", size=8)
    assert capsys.readouterr().err == ""


def test_a_list_of_skipped_images_from_before_does_not_stay(tmp_path, source):
    out = write_tree(tmp_path / "out", {"skipped.csv": b"path,reason\r\n"})  # its build was killed
    build_images(source, out, size=8)
    assert files_in(out) == ["images.h5"]
