"""What counts as a source, in which order, and what is refused."""

import os
import stat
import tracemalloc
import zipfile
import zlib
from dataclasses import replace

import pytest
from pictures import class_files, noise, saved, write_tree, write_zip

from nnflow.errors import SourceError
from nnflow.sources import EXTENSIONS, MAX_FILE_BYTES, UnreadableImageError, open_source

PIXEL = saved(noise(1, 1))


def listing(path):
    with open_source(path) as source:
        return [(item.group, item.path) for item in source.items], source.classes


def both(tmp_path, files):
    """The same files as a folder and as a zip."""
    folder = write_tree(tmp_path / "folder", files)
    return [folder, write_zip(tmp_path / "files.zip", files)]


def one_line(error):
    text = str(error.value)
    assert text.isprintable(), text
    return text


def test_classes_are_slices_in_code_point_order(tmp_path):
    # "a-b" < "a/": by path alone the images of class a would enclose those of class a-b.
    names = ["b/1.png", "a/z.png", "a-b/1.png", "a/B.png", "a/a.png", "a/é.png"]
    names += ["a/deep/er/0.png", "Z/1.png"]
    wanted = [
        ("Z", "Z/1.png"),
        ("a", "a/B.png"),
        ("a", "a/a.png"),
        ("a", "a/deep/er/0.png"),
        ("a", "a/z.png"),
        ("a", "a/é.png"),
        ("a-b", "a-b/1.png"),
        ("b", "b/1.png"),
    ]
    for path in both(tmp_path, dict.fromkeys(names, PIXEL)):
        assert listing(path) == (wanted, ("Z", "a", "a-b", "b"))


def test_order_does_not_depend_on_the_order_of_creation(tmp_path):
    files = class_files(20)
    shuffled = dict(sorted(files.items(), key=lambda file: zlib.crc32(file[0].encode())))
    assert list(shuffled) != list(files)
    for name, order in (("one", files), ("two", shuffled)):
        write_tree(tmp_path / name, order)
        write_zip(tmp_path / f"{name}.zip", order)
    assert listing(tmp_path / "one") == listing(tmp_path / "two")
    assert listing(tmp_path / "one.zip") == listing(tmp_path / "two.zip")
    assert listing(tmp_path / "one") == listing(tmp_path / "one.zip")


def test_flat_source_has_no_classes(tmp_path):
    for path in both(tmp_path, {"b.png": PIXEL, "A.PNG": PIXEL, "a.Jpeg": PIXEL}):
        assert listing(path) == ([(None, "A.PNG"), (None, "a.Jpeg"), (None, "b.png")], ())


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["top/train/cat/1.png", "top/train/dog/2.png"], ["cat", "dog"]),
        (["cat/1.png", "cat/2.png"], ["cat", "cat"]),  # one folder of images is one class
        (["train/cat/1.png"], ["cat"]),
        (["cat/deep/1.png", "dog/1.png"], ["cat", "dog"]),
        (["top/cat/1.png", "top/notes/readme.txt", "other/readme.txt"], ["cat"]),
    ],
)
def test_wrapping_folders_are_looked_through(tmp_path, names, groups):
    for path in both(tmp_path, dict.fromkeys(names, PIXEL)):
        items, classes = listing(path)
        assert [group for group, _ in items] == groups
        assert classes == tuple(sorted(set(groups)))
        assert [name for _, name in items] == [n for n in names if n.endswith(".png")]


@pytest.mark.parametrize("names", [["1.png", "cat/2.png"], ["train/1.png", "train/cat/2.png"]])
def test_images_beside_class_folders_are_refused(tmp_path, names):
    for path in both(tmp_path, dict.fromkeys(names, PIXEL)):
        with pytest.raises(SourceError, match="class folder") as error:
            open_source(path)
        assert "1.png" in one_line(error)
        assert "cat/" in one_line(error)


def test_hidden_and_other_files_are_ignored(tmp_path):
    other = [".hidden.png", ".git/x.png", "__MACOSX/cat/._1.png", "cat/.2.png"]
    other += ["cat/notes.txt", "cat/png", "Thumbs.db"]
    for path in both(tmp_path, dict.fromkeys([*other, "cat/1.png"], PIXEL)):
        assert listing(path)[0] == [("cat", "cat/1.png")]


def test_every_extension_counts(tmp_path):
    names = [f"{i}{extension}" for i, extension in enumerate(EXTENSIONS)]
    assert len(listing(write_tree(tmp_path, dict.fromkeys(names, b"x")))[0]) == len(EXTENSIONS)


def test_reading_gives_the_bytes(tmp_path):
    files = class_files(9)
    files["cat/large.png"] = saved(noise(200, 200))
    folder = write_tree(tmp_path / "folder", files)
    stored = write_zip(tmp_path / "stored.zip", files)
    packed = write_zip(tmp_path / "packed.zip", files, zipfile.ZIP_DEFLATED)
    prefixed = tmp_path / "prefixed.zip"
    prefixed.write_bytes(b"#!/bin/sh\n" * 30 + stored.read_bytes())
    for path in (folder, stored, packed, prefixed):
        with open_source(path) as source:
            assert {item.path: source.read(item) for item in source.items} == files


def test_member_with_a_long_extra_field_is_read_whole(tmp_path):
    info = zipfile.ZipInfo("1.png")
    info.extra = b"\xff\xff\xe8\x03" + bytes(1000)
    with open_source(write_zip(tmp_path / "x.zip", {info: PIXEL})) as source:
        assert source.read(source.items[0]) == PIXEL


def test_digest_names_the_listing_not_the_place(tmp_path):
    def digest(path):
        with open_source(path) as source:
            return source.digest

    files = class_files(6)
    first = digest(write_tree(tmp_path / "one", files))
    (tmp_path / "one").rename(tmp_path / "moved")
    assert digest(tmp_path / "moved") == first
    archive = write_zip(tmp_path / "one.zip", files)
    zipped = digest(archive)
    archive.rename(tmp_path / "moved.zip")
    assert digest(tmp_path / "moved.zip") == zipped

    name, content = next(iter(files.items()))
    changed = content[:-1] + bytes([content[-1] ^ 1])  # same name, same size
    for number, other in enumerate(
        [
            {**files, name: changed},
            {**files, name: content + b"x"},
            {**files, "cat/new.png": PIXEL},
            {("x" + path if path == name else path): data for path, data in files.items()},
        ]
    ):
        assert digest(write_tree(tmp_path / f"other{number}", other)) != first
        assert digest(write_zip(tmp_path / f"other{number}.zip", other)) != zipped


def test_digests_stay_what_they_were(tmp_path):
    """Of the first release: a store is recognised, and goes on, by the digest of its source."""
    classed = {
        "cat/1.png": b"one",
        "cat/deep/2.jpg": b"twotwo",
        "dög/3.png": b"",
        "dög/x y.webp": b"four" * 9,
    }
    wanted = [
        "e70db2fa5f7afee2b1d1b81c0b172f9e",
        "991def133743483681910e9ca00ef428",
        "085e77076eeeb10dbde46bf7b94cfbb1",
        "6278d72d3bad5faf748c993b8fcfd907",
    ]
    found = []
    for name, files in (("classed", classed), ("flat", {"b.png": b"b", "a.jpeg": b"aa"})):
        (tmp_path / name).mkdir()
        for path in both(tmp_path / name, files):
            with open_source(path) as source:
                found.append(source.digest)
    assert found == wanted


def test_an_item_is_small(tmp_path):
    """1.3 million of them, with their paths, are to fit beside everything else."""
    files = {f"{group:04d}/{number:08d}.jpg": b"" for group in range(10) for number in range(300)}
    for path in both(tmp_path, files):
        with open_source(path) as source:
            tracemalloc.start()
            try:
                held = [replace(item, path=item.path + "x", place=item.place + b"") for item in source.items]
                size = tracemalloc.get_traced_memory()[0] / len(held)
            finally:
                tracemalloc.stop()
            assert size < 250


@pytest.mark.parametrize(
    ("files", "words"),
    [({}, "nothing found"), ({"a.txt": b"", "b/c.md": b""}, "2 other files found")],
)
def test_no_images(tmp_path, files, words):
    (tmp_path / "folder").mkdir()
    for path in both(tmp_path, files):
        with pytest.raises(SourceError, match=words) as error:
            open_source(path)
        assert ".png" in one_line(error)


def test_missing_and_foreign_sources(tmp_path):
    with pytest.raises(SourceError, match="no such file or folder"):
        open_source(tmp_path / "nothing")
    for content in (b"", b"not a zip", saved(noise(8, 8))):
        (tmp_path / "file.zip").write_bytes(content)
        with pytest.raises(SourceError, match="not a whole zip") as error:
            open_source(tmp_path / "file.zip")
        one_line(error)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match="wanted a folder"):
        open_source(tmp_path / "pipe")
    with pytest.raises(SourceError, match="cannot be read"):
        open_source("a\0b")


def test_truncated_zip_is_refused(tmp_path):
    path = write_zip(tmp_path / "x.zip", class_files(6))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(SourceError, match="not a whole zip"):
        open_source(path)


@pytest.mark.parametrize(
    "name",
    [
        *("/etc/x.png", "../x.png", "a/../../x.png", "a/../x.txt"),
        *("C:/x.png", "C:\\x.png", "..\\x.png", "\\x.png"),
    ],
)
def test_members_that_point_out_of_the_zip_are_refused(tmp_path, name):
    path = write_zip(tmp_path / "x.zip", {"ok.png": PIXEL, name: PIXEL})
    with pytest.raises(SourceError, match="out of the zip") as error:
        open_source(path)
    one_line(error)


def test_member_with_a_nul_in_its_name_is_refused(tmp_path):
    path = write_zip(tmp_path / "x.zip", {"okay.png": PIXEL, "two.png_txt": PIXEL})
    path.write_bytes(path.read_bytes().replace(b"two.png_txt", b"two.png\0txt"))
    with pytest.raises(SourceError, match="out of the zip"):
        open_source(path)


def test_linked_encrypted_and_strangely_packed_members_are_refused(tmp_path):
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with pytest.raises(SourceError, match="symbolic link"):
        open_source(write_zip(tmp_path / "link.zip", {link: b"/etc/passwd"}))

    path = write_zip(tmp_path / "locked.zip", {"a.png": PIXEL})
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"PK\1\2") + 8] |= 1  # the flag of the central directory
    path.write_bytes(raw)
    with pytest.raises(SourceError, match="encrypted"):
        open_source(path)

    path = write_zip(tmp_path / "bzip.zip", {"a.png": PIXEL}, zipfile.ZIP_BZIP2)
    with pytest.raises(SourceError, match="method 12"):
        open_source(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_twice_is_refused(tmp_path):
    for second in ("a.png", "./a.png"):
        path = tmp_path / "twice.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.png", PIXEL)
            archive.writestr(second, PIXEL)
        with pytest.raises(SourceError, match="in it twice"):
            open_source(path)


def test_backslashes_of_windows_zips_are_folders(tmp_path):
    path = write_zip(tmp_path / "x.zip", {"cat\\1.png": PIXEL, "dog\\2.png": PIXEL})
    assert listing(path) == ([("cat", "cat/1.png"), ("dog", "dog/2.png")], ("cat", "dog"))


def test_damaged_members_are_unreadable(tmp_path):
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = write_zip(tmp_path / f"{method}.zip", {"a.png": bytes(500), "b.png": PIXEL}, method)
        raw = bytearray(path.read_bytes())
        raw[30 + len("a.png") + 3] ^= 0xFF
        path.write_bytes(raw)
        with open_source(path) as source:
            with pytest.raises(UnreadableImageError, match=r"a\.png"):
                source.read(source.items[0])
            assert source.read(source.items[1]) == PIXEL
        raw[:4] = b"zero"  # the local header is gone
        path.write_bytes(raw)
        with open_source(path) as source, pytest.raises(UnreadableImageError, match="damaged zip"):
            source.read(source.items[0])


def test_sizes_that_lie_or_are_too_large(tmp_path):
    path = write_zip(tmp_path / "x.zip", {"a.png": bytes(5000)}, zipfile.ZIP_DEFLATED)
    raw = bytearray(path.read_bytes())
    place = raw.index(b"PK\1\2") + 24
    for size, words in ((10, "checksum"), (MAX_FILE_BYTES + 1, "wanted at most 256.0 MiB")):
        raw[place : place + 4] = size.to_bytes(4, "little")
        path.write_bytes(raw)
        with open_source(path) as source, pytest.raises(UnreadableImageError, match=words):
            source.read(source.items[0])
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with open_source(tmp_path) as source, pytest.raises(UnreadableImageError, match="at most"):
        source.read(source.items[0])


def test_a_member_that_inflates_beyond_its_size_is_not_inflated(tmp_path):
    path = write_zip(tmp_path / "x.zip", {"a.png": bytes(50_000_000)}, zipfile.ZIP_DEFLATED)
    raw = bytearray(path.read_bytes())
    place = raw.index(b"PK\1\2") + 24
    raw[place : place + 4] = (10).to_bytes(4, "little")
    path.write_bytes(raw)
    with open_source(path) as source:
        tracemalloc.start()
        try:
            with pytest.raises(UnreadableImageError, match="checksum"):
                source.read(source.items[0])
            assert tracemalloc.get_traced_memory()[1] < 1_000_000
        finally:
            tracemalloc.stop()


def test_loops_and_doubles_of_links_are_refused(tmp_path):
    write_tree(tmp_path / "images", {"cat/1.png": PIXEL, "dog/1.png": PIXEL})
    (tmp_path / "images/cat/again").symlink_to(tmp_path / "images")
    with pytest.raises(SourceError, match="one folder; remove the link"):
        open_source(tmp_path / "images")
    (tmp_path / "images/cat/again").unlink()
    (tmp_path / "images/emu").symlink_to("dog")
    with pytest.raises(SourceError, match="dog and emu are one folder"):
        open_source(tmp_path / "images")


def test_linked_classes_and_files_are_followed(tmp_path):
    write_tree(tmp_path / "real", {"cat/1.png": PIXEL, "2.png": PIXEL})
    (tmp_path / "images/dog").mkdir(parents=True)
    (tmp_path / "images/cat").symlink_to(tmp_path / "real/cat")
    (tmp_path / "images/dog/2.png").symlink_to(tmp_path / "real/2.png")
    items, _ = listing(tmp_path / "images")
    assert items == [("cat", "cat/1.png"), ("dog", "dog/2.png")]


def test_what_is_no_regular_file_is_unreadable_and_does_not_hang(tmp_path):
    write_tree(tmp_path, {"ok.png": PIXEL})
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to("nothing")
    (tmp_path / "self.png").symlink_to("self.png")
    with open_source(tmp_path) as source:
        assert len(source.items) == 4
        for item in source.items:
            if item.path == "ok.png":
                assert source.read(item) == PIXEL
            else:
                with pytest.raises(UnreadableImageError, match="not a regular file"):
                    source.read(item)
        assert source.digest


def test_a_file_that_changed_or_vanished_is_unreadable(tmp_path):
    write_tree(tmp_path, {"a.png": PIXEL, "b.png": PIXEL})
    with open_source(tmp_path) as source:
        (tmp_path / "a.png").write_bytes(PIXEL + b"x")
        (tmp_path / "b.png").unlink()
        for item, words in zip(source.items, ("changed its size", "no such file"), strict=True):
            with pytest.raises(UnreadableImageError, match=words):
                source.read(item)


def test_strange_names_survive_and_are_escaped_when_shown(tmp_path):
    odd = os.fsdecode(b"new\nline \xff\x1b[31m.png")
    (tmp_path / odd).write_bytes(b"")
    with open_source(tmp_path) as source:
        assert source.items[0].path == odd
        assert source.read(source.items[0]) == b""
        assert source.digest
        (tmp_path / odd).unlink()
        with pytest.raises(UnreadableImageError) as error:
            source.read(source.items[0])
        assert "\\n" in one_line(error)
        assert error.value.path == odd
