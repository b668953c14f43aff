"""WebDataset shards: what they hold, how they are read, and what is refused."""

import gzip
import io
import json
import os
import tarfile
import threading

import numpy as np
import pytest
from pictures import class_files, noise, saved, write_tree
from refusals import refused

from nnflow.decode import Decoder
from nnflow.errors import DegradedWarning, SourceError
from nnflow.ingest import build_images
from nnflow.sources import UnreadableImageError, open_source, shards
from nnflow.store import ImageStore

PIXEL = saved(noise(1, 1))


def write_tar(path, files, kind=tarfile.USTAR_FORMAT):
    """Writes {name or TarInfo: bytes} as tarfile does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as archive:
        for name, content in files.items():
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def samples(files, label=lambda group: {"cls": group.encode()}):
    """{class/0001.png: bytes} as members of one key per image, the class beside the image."""
    members = {}
    for path, content in files.items():
        group, name = path.split("/")
        key, kind = name.split(".")
        members |= {f"{key}.{extension}": text for extension, text in label(group).items()}
        members |= {f"{key}.{kind}": content, f"{key}.txt": b"a caption"}
    return members


def write_shards(folder, files, count, **options):
    """Images in turn over `count` shards, so that every class is in every shard."""
    names = list(files)
    for shard in range(count):
        part = {name: files[name] for name in names[shard * len(names) // count :][: len(names) // count]}
        write_tar(folder / f"{shard:05d}.tar", samples(part, **options))
    return folder


def listing(path):
    with open_source(path) as source:
        return [(item.group, item.path) for item in source.items], source.classes


@pytest.fixture(scope="module")
def files():
    return class_files(120)


@pytest.fixture(scope="module")
def wanted(tmp_path_factory, files):
    """The store of the same images as a folder."""
    home = tmp_path_factory.mktemp("wanted")
    return ImageStore.build(write_tree(home / "source", files), home / "out", size=8)


def same_images(store, wanted):
    assert store.classes == wanted.classes
    assert store.labels.tolist() == wanted.labels.tolist()
    np.testing.assert_array_equal(store.pixels.numpy(), wanted.pixels.numpy())


@pytest.mark.parametrize(
    "label",
    [
        lambda group: {"cls": group.encode()},
        lambda group: {"cls": f" {group}\n".encode(), "json": b'{"label": "wrong"}'},
        lambda group: {"json": json.dumps({"label": group, "width": 8}).encode()},
        lambda group: {"json": json.dumps({"cls": group}).encode()},
    ],
    ids=["cls", "cls before json", "json label", "json cls"],
)
def test_shards_give_the_store_of_the_folder(tmp_path, files, wanted, label):
    source = write_shards(tmp_path / "shards", files, 4, label=label)
    same_images(ImageStore.build(source, tmp_path / "out", size=8), wanted)


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_without_labels_the_folders_of_the_keys_are_classes(tmp_path, files, wanted, kind):
    """Also with names too long for a plain header, which every format keeps in its own way."""
    long = "a" * 90 + "/" + "ü" * (20 if kind == tarfile.USTAR_FORMAT else 200)
    path = write_tar(tmp_path / "one.tar", {f"./{long}/{name}": data for name, data in files.items()}, kind)
    same_images(ImageStore.build(path, tmp_path / "out", size=8), wanted)
    items, _ = listing(path)
    assert items[0] == ("cat", f"{long}/cat/0000.png")


def test_members_are_those_that_tarfile_finds(tmp_path):
    """Offsets and sizes, by the standard library's reader."""
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        contents = {f"{'d' * (37 * i % 120 + 1)}/{i}.png": bytes([i]) * (i * 97) for i in range(40)}
        path = write_tar(tmp_path / "x.tar", {"top/": b"", **contents}, kind)
        with open_source(path) as source, tarfile.open(path) as archive:
            assert {item.path: source.read(item) for item in source.items} == contents
            for item in source.items:
                shard, offset = shards._PLACE.unpack(item.place)
                member = archive.getmember(item.path)
                assert (shard, offset, item.size) == (0, member.offset_data, member.size)


def with_size(path, at, field):
    """The tar at `path`, the size in the header at byte `at` replaced, its checksum made to fit."""
    raw = bytearray(path.read_bytes())
    raw[at + 124 : at + 136] = field
    raw[at + 148 : at + 156] = b" " * 8
    raw[at + 148 : at + 156] = b"%06o\0 " % sum(raw[at : at + 512])
    path.write_bytes(raw)
    return path


def test_sizes_beyond_octal(tmp_path):
    """GNU writes them in base 256, POSIX in a header of its own; here of files that are small."""
    path = write_tar(tmp_path / "x.tar", {"a.png": PIXEL})
    with open_source(with_size(path, 0, b"\x80" + len(PIXEL).to_bytes(11, "big"))) as source:
        assert source.read(source.items[0]) == PIXEL
    info = tarfile.TarInfo("b.png")
    info.pax_headers = {"size": str(len(PIXEL)), "comment": "other = things\n"}
    path = write_tar(tmp_path / "y.tar", {info: PIXEL, "c.png": PIXEL}, tarfile.PAX_FORMAT)
    with open_source(with_size(path, 1024, b"%011o\0" % 0)) as source:
        assert [source.read(item) for item in source.items] == [PIXEL, PIXEL]


def test_a_folder_has_no_content_whatever_its_size(tmp_path):
    folder = tarfile.TarInfo("top")
    folder.type = tarfile.DIRTYPE
    path = write_tar(tmp_path / "x.tar", {folder: b"", "top/a.png": PIXEL})
    with open_source(with_size(path, 0, b"%011o\0" % 4096)) as source:
        assert source.read(source.items[0]) == PIXEL


def test_numbers_as_classes_sort_as_numbers(tmp_path):
    for label in (lambda n: {"cls": n.encode()}, lambda n: {"json": b'{"label": %d}' % int(n)}):
        files = {f"{number}/{number:06d}.png": PIXEL for number in (1000, 9, 10, 0, 100)}
        path = write_tar(tmp_path / "x.tar", samples(files, label))
        items, classes = listing(path)
        assert classes == ("0000", "0009", "0010", "0100", "1000")
        assert [name for _, name in items] == [f"{n:06d}.png" for n in (0, 9, 10, 100, 1000)]


def test_minus_one_is_no_label(tmp_path):
    files = {f"-1/{number}.png": PIXEL for number in range(3)}
    for label in (lambda n: {"cls": n.encode()}, lambda n: {"json": b'{"label": -1}'}):
        assert listing(write_tar(tmp_path / "x.tar", samples(files, label)))[1] == ()


def test_which_member_is_the_image(tmp_path):
    names = [
        "a.jpg",
        "a.mask.png",
        "a.json.gz",
        "b.1.png",
        "b.txt",
        "c.txt",
        ".d.png",
        "e/f.PNG",
        "e/x.y/g.png",
    ]
    path = write_tar(
        tmp_path / "x.tar", {f"top/{name}": PIXEL for name in names} | {"top/__MACOSX/z.png": b""}
    )
    with refused(SourceError, "beside folders of images such as e/"):
        open_source(path)
    path = write_tar(tmp_path / "x.tar", {f"top/{name}": PIXEL for name in names if "/" not in name})
    assert [name for _, name in listing(path)[0]] == ["top/a.jpg", "top/b.1.png"]


def test_img2dataset_puts_tables_and_statistics_beside_its_shards(tmp_path, files, wanted):
    source = write_shards(tmp_path / "s", files, 2)
    write_tree(source, {"00000.parquet": b"PAR1", "00000_stats.json": b"{}"})
    same_images(ImageStore.build(source, tmp_path / "out", size=8), wanted)


def test_a_pattern_chooses_a_split(tmp_path, files, wanted):
    source = write_shards(tmp_path / "s", files, 2)
    for number in range(2):
        (source / f"{number:05d}.tar").rename(source / f"in1k-train-{number:05d}.tar")
    write_tar(source / "in1k-validation-0.tar", samples({"cat/x.png": PIXEL}))
    with refused(
        SourceError, r"different splits; choose one by a pattern in quotes, such as '.*/s/in1k-train\*'"
    ):
        open_source(source)
    same_images(ImageStore.build(source / "in1k-train*", tmp_path / "out", size=8), wanted)
    with refused(SourceError, "matches no file"):
        open_source(source / "dev-*")
    with refused(SourceError, "no such file or folder"):
        open_source(tmp_path / "nothing/dev-*")


def test_images_beside_shards_are_taken_and_the_user_is_told(tmp_path, files):
    source = write_shards(tmp_path / "s", files, 2)
    write_tree(source, {"preview.png": PIXEL})
    with pytest.warns(
        DegradedWarning, match=r"1 image files are taken, not what is in .*00000\.tar.*\*\.tar'"
    ):
        assert listing(source) == ([(None, "preview.png")], ())
    assert len(listing(source / "*.tar")[0]) == 120


def test_shards_are_read_from_front_to_back(tmp_path, files, monkeypatch):
    """The store goes by class; every class is in every shard."""
    source = write_shards(tmp_path / "s", files, 3)
    seen = []
    real = shards.TarSource.read

    def read(self, item):
        seen.append(item.place)
        return real(self, item)

    monkeypatch.setattr(shards.TarSource, "read", read)
    with open_source(source) as opened:
        assert [item.place for item in opened.items] != sorted(item.place for item in opened.items)
        opened.digest  # noqa: B018 probes
        probes = len(seen)
    build_images(source, tmp_path / "out", size=8, workers=1)
    assert seen[2 * probes :] == sorted(seen[2 * probes :])
    assert len(seen) == 120 + 2 * probes


def test_the_first_unreadable_in_reading_order_is_named_with_any_workers(tmp_path, files):
    # Cats come first in the store; the first two of these are read by one task.
    broken = {**files, "emu/0056.png": b"", "cat/0060.png": b"x", "cat/0081.png": b"x"}
    source = write_shards(tmp_path / "s", {name: broken[name] for name in files}, 4)
    for workers in (1, 3, 8):
        with refused(UnreadableImageError, r"00001\.tar/0056\.png: an empty file"):
            build_images(source, tmp_path / f"{workers}", size=8, workers=workers)
    store = ImageStore.build(source, tmp_path / "out", size=8, skip_unreadable=True)
    assert len(store) == 117


def test_bytes_do_not_depend_on_workers_or_on_being_resumed(tmp_path, files, monkeypatch):
    source = write_shards(tmp_path / "s", files, 4)
    first = build_images(source, tmp_path / "a", size=8, workers=1).read_bytes()
    assert build_images(source, tmp_path / "b", size=8, workers=7).read_bytes() == first
    seen = []
    real = Decoder.decode

    def interrupted(self, content, path):
        if len(seen) == 70:
            raise KeyboardInterrupt
        seen.append(path)
        return real(self, content, path)

    monkeypatch.setattr(Decoder, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_images(source, tmp_path / "c", size=8, workers=1)
    monkeypatch.setattr(Decoder, "decode", real)
    done = np.frombuffer((tmp_path / "c/images.h5.journal").read_bytes(), np.uint8)
    assert done.sum() == 64  # whole tasks; front to back, so in the midst of every class
    assert np.flatnonzero(done).max() > 80
    assert build_images(source, tmp_path / "c", size=8, workers=2).read_bytes() == first


def test_many_shards_few_open_files(tmp_path, monkeypatch):
    """Also while other threads read, of shards that are closed and opened again."""
    monkeypatch.setattr(shards, "_OPEN", 3)
    contents = {f"{i:03d}": saved(noise(4, 4, seed=i)) for i in range(40)}
    for name, content in contents.items():
        write_tar(tmp_path / "s" / f"{name}.tar", {f"{name}.png": content})

    def held():
        links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
        return sum(os.path.islink(link) and str(tmp_path) in os.readlink(link) for link in links)

    wrong, most = [], []
    with open_source(tmp_path / "s") as source:

        def reading(seed):
            for row in np.random.default_rng(seed).integers(0, 40, 500):
                item = source.items[row]
                if source.read(item) != contents[item.path[:3]]:
                    wrong.append(item.path)
            most.append(held())

        threads = [threading.Thread(target=reading, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert max(most) <= 3 + 4  # kept, and in the hands of a thread
        assert 1 <= held() <= 3
    assert held() == 0


def test_digest_names_the_content_not_the_place(tmp_path, files):
    def digest(path):
        with open_source(path) as source:
            return source.digest

    write_shards(tmp_path / "a", files, 2)
    first = digest(tmp_path / "a")
    assert digest((tmp_path / "a").rename(tmp_path / "b")) == first
    members = samples(files)
    changes = [
        {**members, "0003.png": saved(noise(8, 8, seed=99))},
        {**members, "0003.cls": b"dog"},
        {**members, "9999.png": PIXEL, "9999.cls": b"cat"},
    ]
    one = digest(write_tar(tmp_path / "one.tar", members))
    others = {digest(write_tar(tmp_path / "two.tar", change)) for change in changes}
    assert len({first, one, *others}) == 5


def test_truncated_anywhere_is_refused_with_the_place(tmp_path):
    path = write_tar(tmp_path / "00007.tar", {"a.png": bytes(1500), "b.png": bytes(700), "b.cls": b"1"})
    whole = path.read_bytes()
    end = 512 + 1536 + 512 + 1024 + 512 + 512  # of the last member, as tar lays them out
    assert not any(whole[end:])
    for length in [1, 511, 512, 600, 2047, 2048, 2100, 2560, 3000, 3584, 4000, 4096, end, end + 100]:
        path.write_bytes(whole[:length])
        ends = {"a.png": (512, 2012), "b.png": (2560, 3260), "b.cls": (4096, 4097)}
        within = next((name for name, (start, stop) in ends.items() if start <= length < stop), "")
        words = f", within {within}, which ends at" if within else ", without the end mark"
        words = f"cut off at byte {length}{words}" if length >= 512 else "not a tar file"
        with refused(SourceError, rf"00007\.tar: {words}"):
            open_source(path)
    path.write_bytes(write_tar(path, {"a.png": PIXEL}).read_bytes()[: 2 * 512 + 512])
    assert len(listing(path)[0]) == 1


def test_damaged_headers_are_refused_with_the_place(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a.png": bytes(600), "b.png": PIXEL})
    whole = path.read_bytes()
    for change in (1, 130, 150, 300):
        raw = bytearray(whole)
        raw[512 + 1024 + change] ^= 0x15
        path.write_bytes(raw)
        with refused(SourceError, r"x\.tar: damaged at byte 1536"):
            open_source(path)
    path.write_bytes(saved(noise(30, 30)))
    with refused(SourceError, "not a tar file"):
        open_source(path)


def test_hostile_bytes_are_one_error(tmp_path):
    """Whatever the header says; its checksum is made to fit."""
    path = write_tar(tmp_path / "x.tar", {"ä" * 80 + ".png": PIXEL, "b.png": PIXEL}, tarfile.PAX_FORMAT)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    random = np.random.default_rng(0)
    refusals = []
    for _ in range(300):
        raw = whole.copy()
        raw[random.integers(0, 2048, 4)] = random.integers(0, 256, 4)
        raw[124:136] = raw[124:136] if random.random() < 0.5 else random.integers(0, 256, 12)
        raw[148:156] = 32
        raw[148:156] = np.frombuffer(b"%06o\0 " % int(raw[:512].sum()), np.uint8)
        path.write_bytes(raw.tobytes())
        try:
            open_source(path).close()
        except SourceError as error:
            refusals.append(str(error))
    assert 50 < len(refusals) < 300
    assert all(text.isprintable() for text in refusals)


def test_two_images_of_one_key_are_refused(tmp_path):
    for one, two in (("k/a.jpg", "k/a.png"), ("a.1.png", "a.2.png")):
        with refused(SourceError, rf"x\.tar: {one} and {two} are two images of one key"):
            open_source(write_tar(tmp_path / "x.tar", {one: PIXEL, two: PIXEL}))
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("a.png"))
    with refused(SourceError, r"x\.tar: a\.png is in it twice"):
        open_source(path)
    for shard in "12":  # keys count within a shard
        write_tar(tmp_path / "s" / f"{shard}.tar", {"a.png": PIXEL})
    assert listing(tmp_path / "s")[0] == [(None, "1.tar/a.png"), (None, "2.tar/a.png")]


def test_a_label_missing_in_some_is_refused_with_the_first(tmp_path):
    write_tar(tmp_path / "s/0.tar", {"a.png": PIXEL, "a.cls": b"1"})
    write_tar(tmp_path / "s/1.tar", {"b.png": PIXEL, "c.png": PIXEL, "b.json": b"{}", "d.cls": b"7"})
    with refused(SourceError, r"1\.tar/b\.png has no label, .* but others have"):
        open_source(tmp_path / "s")


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("a.cls", b" \n", "empty"),
        ("a.cls", b"\xff", "not UTF-8"),
        ("a.cls", bytes(1 << 21), "2097152 bytes long"),
        ("a.json", b"{", "not JSON"),
        ("a.json", b"[" * 100_000, "not JSON"),
        ("a.json", b'{"label": [1, 2]}', r"its label is \[1, 2\]"),
        ("a.json", b'{"label": true}', "its label is True"),
        ("a.json", b'{"label": 0.5}', r"its label is 0\.5"),
    ],
)
def test_what_is_no_label(tmp_path, name, content, cause):
    with refused(SourceError, rf"x\.tar: {name} is no label \({cause}"):
        open_source(write_tar(tmp_path / "x.tar", {"a.png": PIXEL, name: content}))


@pytest.mark.parametrize("name", ["/etc/x.png", "../x.png", "a/../../x.png", "a/../x.txt"])
def test_members_that_point_out_are_refused(tmp_path, name):
    with refused(SourceError, "points out of the tar; pack it with relative names"):
        open_source(write_tar(tmp_path / "x.tar", {"ok.png": PIXEL, name: PIXEL}))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.GNUTYPE_SPARSE])
def test_links_are_refused_and_what_is_no_file_is_not_an_image(tmp_path, kind):
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = kind, "/etc/passwd"
    with refused(SourceError, r"link\.png is a link or a sparse file"):
        open_source(write_tar(tmp_path / "x.tar", {"a.png": PIXEL, link: b""}))
    pipe = tarfile.TarInfo("pipe.png")
    pipe.type = tarfile.FIFOTYPE
    assert listing(write_tar(tmp_path / "x.tar", {"a.png": PIXEL, pipe: b""}))[0] == [(None, "a.png")]


def test_compressed_shards_are_refused_with_the_fix(tmp_path):
    plain = write_tar(tmp_path / "x.tar", {"a.png": PIXEL})
    for name in ("s/00000.tar.gz", "t/00000.tgz"):
        write_tree(tmp_path, {name: gzip.compress(plain.read_bytes())})
        for path in (tmp_path / name, (tmp_path / name).parent):
            with refused(SourceError, r"00000\.t.*gz: a compressed tar.* gunzip"):
                open_source(path)
    plain.write_bytes(gzip.compress(plain.read_bytes()))
    with refused(SourceError, "not a tar file; .*uncompressed"):
        open_source(plain)


def test_shards_without_images(tmp_path):
    with refused(SourceError, "no images, 2 other files found"):
        open_source(write_tar(tmp_path / "x.tar", {"a.txt": b"", "b.cls": b"1"}))
    with refused(SourceError, "no images, nothing found"):
        open_source(write_tar(tmp_path / "x.tar", {}))
    os.mkfifo(tmp_path / "pipe.tar")
    with refused(SourceError, r"pipe\.tar: not a regular file"):
        open_source(tmp_path / "*.tar")


def test_a_shard_that_is_cut_or_gone_while_it_is_read(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a.png": bytes(3000)})
    with open_source(path) as source:
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(UnreadableImageError, match="was cut since"):
            source.read(source.items[0])
        source.close()
        path.unlink()
        with pytest.raises(UnreadableImageError, match="no such file"):
            source.read(source.items[0])
