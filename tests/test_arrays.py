"""Images as arrays: every layout by hand, the same bits through every way in, and what is refused."""

import os
import shutil
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from pictures import noise, write_tree
from PIL import Image
from refusals import refused

from nnflow.errors import SourceError
from nnflow.ingest import build_images
from nnflow.sources import arrays, open_source
from nnflow.store import ImageStore

IMAGES = np.stack([noise(6, 6, seed=(1, i)) for i in range(90)])  # n H W C
LABELS = np.random.default_rng(0).integers(1, 12, 90)  # numbered from 1, as ImageNet's are
FLAT = IMAGES.transpose(0, 3, 1, 2).reshape(90, -1)  # as downsampled ImageNet has them


def saved(path, *unnamed, packed=False, **named):
    path.parent.mkdir(parents=True, exist_ok=True)
    (np.savez_compressed if packed else np.savez)(path, *unnamed, **named)
    return path


def folder_store(home, images=IMAGES, labels=LABELS, **options):
    """The same images as PNG in class folders."""
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        name = home / "png" / f"{label:04d}" / f"{number:05d}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(name)
    return ImageStore.build(home / "png", home / "out-png", **{"size": 6, **options})


def same_images(store, wanted):
    assert [int(name) for name in store.classes] == [int(name) for name in wanted.classes]
    assert store.labels.tolist() == wanted.labels.tolist()
    np.testing.assert_array_equal(store.pixels.numpy(), wanted.pixels.numpy())


@pytest.mark.parametrize("packed", [False, True])
def test_downsampled_imagenet_gives_the_store_of_the_folder(tmp_path, packed):
    parts = np.array_split(np.arange(90), 4)
    for number, rows in enumerate(parts, 1):
        file = tmp_path / "in" / f"train_data_batch_{number}.npz"
        saved(file, packed=packed, data=FLAT[rows], labels=LABELS[rows].tolist(), mean=FLAT.mean(0))
    store = ImageStore.build(tmp_path / "in", tmp_path / "out", size=6)
    same_images(store, folder_store(tmp_path))
    assert store.classes == tuple(f"{label:02d}" for label in range(1, 12))
    assert (
        store.paths[0] == f"train_data_batch_{1 + np.argmin(LABELS) // 23}.npz/{np.argmin(LABELS) % 23:02d}"
    )


LAYOUTS = {
    "NHWC": IMAGES,
    "NCHW": np.ascontiguousarray(IMAGES.transpose(0, 3, 1, 2)),
    "rows": FLAT,
    "NHW": IMAGES[..., 0],
    "NHW1": IMAGES[..., :1],
    "N1HW": IMAGES[:, None, ..., 0],
    "grey rows": IMAGES[..., 0].reshape(90, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"grey": True}, {"size": 4}, {"size": 9, "grey": True}], ids=str)
def test_every_layout_and_size(tmp_path, layout, options):
    """At the size and colour that the array has nothing is decoded; otherwise as from an image file."""
    images = LAYOUTS[layout]
    plain = IMAGES if images.size == IMAGES.size else IMAGES[..., 0]
    source = saved(tmp_path / "batch.npz", images, LABELS)  # ADM's names: arr_0, arr_1
    store = ImageStore.build(source, tmp_path / "out", **{"size": 6, **options})
    same_images(store, folder_store(tmp_path, plain, **options))


def test_images_that_are_not_square_are_cut(tmp_path):
    images = np.stack([noise(6, 10, seed=i) for i in range(20)])
    np.save(tmp_path / "x.npy", images)
    store = ImageStore.build(tmp_path / "x.npy", tmp_path / "out", size=6)
    assert store.classes == ()
    wanted = images[:, :, 2:8].transpose(0, 3, 1, 2).reshape(20, -1)
    np.testing.assert_array_equal(store.pixels.numpy(), wanted)
    assert list(store.paths) == [f"{number:02d}" for number in range(20)]


def test_where_nothing_is_to_be_decoded_nothing_is(tmp_path, monkeypatch):
    source = saved(tmp_path / "x.npz", data=FLAT, labels=LABELS)
    first = build_images(source, tmp_path / "a", size=6, workers=1).read_bytes()
    monkeypatch.setattr("nnflow.ingest.Decoder.decode", None)
    monkeypatch.setattr("nnflow.ingest._CHUNK_BYTES", 700)  # tasks of 6 rows
    for workers in (1, 5):
        out = build_images(source, tmp_path / f"{workers}", size=6, workers=workers)
        assert out.read_bytes() == first


def test_a_build_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    source = saved(tmp_path / "x.npz", data=FLAT, labels=LABELS)
    whole = build_images(source, tmp_path / "a", size=6).read_bytes()
    monkeypatch.setattr("nnflow.ingest._CHUNK_BYTES", 1100)  # tasks of 10 rows
    real, calls = arrays.ArraySource.block, []

    def block(self, positions):
        calls.append(positions.tolist())
        if len(calls) > 3:
            raise KeyboardInterrupt
        return real(self, positions)

    monkeypatch.setattr(arrays.ArraySource, "block", block)
    with pytest.raises(KeyboardInterrupt):
        build_images(source, tmp_path / "b", size=6, workers=1)
    assert (tmp_path / "b/images.h5.journal").read_bytes() == b"\1" * 30 + bytes(60)
    calls.clear()
    monkeypatch.setattr(arrays.ArraySource, "block", real)
    assert build_images(source, tmp_path / "b", size=6).read_bytes() == whole


def test_stored_arrays_are_mapped_and_packed_ones_unpacked_once(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    unpacked = []
    real = arrays._unpacked

    def counted(array):
        unpacked.append(array.name)
        return real(array)

    monkeypatch.setattr(arrays, "_unpacked", counted)

    def maps_of(path):
        with open("/proc/self/maps") as file:
            return sum(str(path) in line for line in file)

    for packed in (False, True):
        path = saved(tmp_path / f"{packed}.npz", packed=packed, data=FLAT)
        with open_source(path) as source:
            assert maps_of(tmp_path) == 0  # nothing is read before it is needed
            with ThreadPoolExecutor(4) as pool:
                for block in pool.map(source.block, [np.arange(90)] * 8):
                    np.testing.assert_array_equal(block.reshape(90, -1), FLAT)
            assert maps_of(path) == (not packed)
            assert maps_of(tmp_path / "temporary") == packed
            assert os.listdir(tmp_path / "temporary") == []
        assert maps_of(tmp_path) == 0
    assert len(unpacked) == 1


def test_an_array_of_gigabytes_is_not_brought_into_memory(tmp_path):
    """A .npy that is one hole; only what is asked for is touched."""
    path = tmp_path / "x.npy"
    with path.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (1 << 22, 3, 32, 32)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + (12 << 30))
    with open_source(path) as source:
        assert len(source.items) == 1 << 22
        assert not source.block(np.array([5, (1 << 22) - 1])).any()
        assert source.items[-1].path == "4194303"


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "packed.npz"])
def test_what_has_been_read_does_not_stay_in_memory(tmp_path, monkeypatch, name):
    """Pages of a map count as the process's memory once they are read: 1.3 million images were 4 GB."""
    monkeypatch.setattr(arrays, "_RESIDENT", 4 << 20)
    monkeypatch.setattr(arrays, "_COPY_BYTES", 1 << 20)
    images = np.random.default_rng(0).integers(0, 256, (1 << 14, 3, 32, 32), dtype=np.uint8)  # 48 MiB
    write = {"x.npy": np.save, "x.npz": np.savez, "packed.npz": np.savez_compressed}[name]
    write(tmp_path / name, images)
    most, before = 0, resident_of_files()
    with open_source(tmp_path / name) as source:
        for start in range(0, len(images), 256):
            rows = np.arange(start, start + 256)
            np.testing.assert_array_equal(source.block(rows), images[rows])
            most = max(most, resident_of_files() - before)
        for row in range(0, len(images), 16):
            item = source.items[row]
            assert source.read(item)[3, 5, 1] == images[row, 1, 3, 5]
            most = max(most, resident_of_files() - before)
    assert most < 12 << 20


def resident_of_files():
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("RssFile"))
    return int(line.split()[1]) << 10


def test_digest_names_the_content_not_the_place(tmp_path):
    def digest(path):
        with open_source(path) as source:
            return source.digest

    first = digest(saved(tmp_path / "a.npz", data=FLAT, labels=LABELS))
    assert digest((tmp_path / "a.npz").rename(tmp_path / "b.npz")) == first
    assert digest(saved(tmp_path / "b.npz", packed=True, data=FLAT, labels=LABELS, mean=FLAT[0])) == first
    changed, other = FLAT.copy(), LABELS.copy()
    changed[50, 7] ^= 1
    other[3] = 1 + other[3] % 11
    for number, named in enumerate(
        [
            {"data": changed, "labels": LABELS},
            {"data": FLAT, "labels": other},
            {"data": FLAT, "labels": LABELS + 1},
            {"data": FLAT},
            {"data": FLAT[:-1], "labels": LABELS[:-1]},
            {"data": LAYOUTS["NCHW"], "labels": LABELS},
        ]
    ):
        assert digest(saved(tmp_path / f"{number}.npz", **named)) != first
    np.save(tmp_path / "a.npy", FLAT)
    np.save(tmp_path / "b.npy", changed)
    assert digest(tmp_path / "a.npy") != digest(tmp_path / "b.npy")


def test_minus_one_is_no_label(tmp_path):
    with open_source(saved(tmp_path / "x.npz", data=FLAT, labels=np.full(90, -1))) as source:
        assert source.classes == ()
        assert source.items[0].group is None
    LABELS_SOME = LABELS.copy()
    LABELS_SOME[7] = -1
    with refused(
        SourceError, r"row 7 of x\.npz has no label \(none, or -1\), others have classes; wanted 0 or more"
    ):
        open_source(saved(tmp_path / "x.npz", data=FLAT, labels=LABELS_SOME))


def test_names_as_labels(tmp_path):
    names = np.array(["cat", "10", "9"])[np.arange(90) % 3]
    with open_source(saved(tmp_path / "x.npz", data=FLAT, labels=names)) as source:
        assert source.classes == ("10", "9", "cat")
        assert [item.group for item in source.items] == ["10"] * 30 + ["9"] * 30 + ["cat"] * 30
        assert [int(item.path) for item in source.items[:3]] == [1, 4, 7]


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"data": FLAT / 255}, "float64 values; wanted images as uint8, 0 to 255"),
        ({"data": FLAT.astype(np.float32)}, r"float32 .*\(108,\); wanted latents .*images as uint8"),
        ({"data": FLAT.astype(np.int64)}, "int64 values; wanted images as uint8"),
        ({"data": FLAT[:, :-1]}, r"images of shape \(107,\); wanted"),
        ({"data": np.zeros((4, 6, 6, 4), np.uint8)}, r"images of shape \(6, 6, 4\); wanted"),
        ({"data": np.zeros((4, 3, 6, 3), np.uint8)}, r"images of shape \(3, 6, 3\); wanted"),
        ({"data": np.zeros((4, 2, 3, 6, 6), np.uint8)}, "wanted"),
        ({"data": np.zeros((4, 0), np.uint8)}, "wanted"),
        ({"data": np.zeros((), np.uint8)}, "wanted"),
        ({"data": np.zeros((0, 108), np.uint8)}, "no images, the arrays are empty"),
        ({"mu": np.zeros(3), "sigma": np.zeros((3, 3))}, "no array named data, .*found mu, sigma"),
        ({"data": np.asfortranarray(FLAT)}, "in Fortran order; save it anew .* from numpy.ascontiguousarray"),
        ({"data": FLAT, "labels": LABELS[:-1]}, r"int64 \(89,\); wanted the class of each of the 90 images"),
        ({"data": FLAT, "labels": LABELS / 2}, "float64 .*wanted the class"),
        ({"data": FLAT, "labels": np.eye(90, dtype=np.int64)}, "wanted the class"),
    ],
)
def test_what_is_no_array_of_images(tmp_path, named, words):
    with refused(SourceError, rf"x\.npz.*{words}"):
        open_source(saved(tmp_path / "x.npz", **named))


def test_pickles_are_never_read(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    for named in ({"data": np.array([Bomb()])}, {"data": FLAT, "labels": np.array([Bomb()] * 90)}):
        with refused(SourceError, "pickled Python objects, which are never read"):
            open_source(saved(tmp_path / "x.npz", **named))
    np.save(tmp_path / "x.npy", np.array([Bomb()]))
    with refused(SourceError, "pickled"):
        open_source(tmp_path / "x.npy")
    assert not (tmp_path / "exploded").exists()


def test_files_that_do_not_fit_together(tmp_path):
    saved(tmp_path / "s/1.npz", data=FLAT, labels=LABELS)
    saved(tmp_path / "s/2.npz", data=FLAT[:, :48], labels=LABELS)
    with refused(
        SourceError, r"2\.npz: data\.npy holds images of \(48,\), .*1\.npz.* of \(108,\); wanted one"
    ):
        open_source(tmp_path / "s")
    saved(tmp_path / "s/2.npz", data=FLAT)
    with refused(SourceError, r"2\.npz has no labels, others have"):
        open_source(tmp_path / "s")
    for name in ("train_data_batch_1.npz", "val_data.npz"):
        saved(tmp_path / "t" / name, data=FLAT)
    with refused(
        SourceError, r"different splits; choose one by a pattern in quotes, such as '.*/t/(train|val)\*'"
    ):
        open_source(tmp_path / "t")
    with open_source(tmp_path / "t/train*") as source:
        assert len(source.items) == 90


@pytest.mark.parametrize("packed", [False, True])
def test_truncated_anywhere_is_refused(tmp_path, packed):
    whole = saved(tmp_path / "x.npz", packed=packed, data=FLAT, labels=LABELS).read_bytes()
    for length in [0, 10, 100, 300, len(whole) // 2, len(whole) - 30]:
        (tmp_path / "x.npz").write_bytes(whole[:length])
        with refused(SourceError, r"x\.npz: not a whole \.npz or \.npy"):
            open_source(tmp_path / "x.npz")
    np.save(tmp_path / "y.npy", FLAT)
    whole = (tmp_path / "y.npy").read_bytes()
    for length in [6, 9, 60, 128, 1000, len(whole) - 1, len(whole) + 1]:
        (tmp_path / "y.npy").write_bytes((whole + b"x")[:length])
        with refused(SourceError, r"y\.npy: (not a whole|\d+ bytes of the 9848 of its)"):
            open_source(tmp_path / "y.npy")


@pytest.mark.parametrize("packed", [False, True])
def test_damaged_pixels_are_found_before_they_are_stored(tmp_path, packed):
    path = saved(tmp_path / "x.npz", packed=packed, data=FLAT)
    raw = bytearray(path.read_bytes())
    raw[5000] ^= 0xFF
    path.write_bytes(raw)
    for size in (6, 8):
        with refused(SourceError, r"x\.npz: data\.npy: (its checksum differs|cannot be read)"):
            build_images(path, tmp_path / "out", size=size, skip_unreadable=True)
        shutil.rmtree(tmp_path / "out")


def test_hostile_headers_are_one_error(tmp_path):
    whole = saved(tmp_path / "x.npz", data=FLAT, labels=LABELS).read_bytes()
    np.save(tmp_path / "x.npy", FLAT)
    bare = (tmp_path / "x.npy").read_bytes()
    random = np.random.default_rng(2)
    refusals = []
    for content, name in ((whole, "x.npz"), (bare, "x.npy")):
        for _ in range(150):
            raw = np.frombuffer(content, np.uint8).copy()
            places = random.integers(-400, 200, 3) if name == "x.npz" else random.integers(0, 128, 2)
            raw[places] = random.integers(0, 256, len(places))
            (tmp_path / name).write_bytes(raw.tobytes())
            try:
                with open_source(tmp_path / name) as source:
                    source.block(np.arange(3))
            except SourceError as error:
                refusals.append(str(error))
    assert len(refusals) > 150
    assert all(text.isprintable() for text in refusals)


def test_an_array_that_is_cut_after_it_was_listed(tmp_path):
    np.save(tmp_path / "x.npy", FLAT)
    with open_source(tmp_path / "x.npy") as source:
        os.truncate(tmp_path / "x.npy", 5000)
        with refused(SourceError, r"x\.npy: was cut since it was listed"):
            source.read(source.items[0])


def test_no_room_to_unpack_is_told_with_the_fix(tmp_path, monkeypatch):
    path = saved(tmp_path / "x.npz", packed=True, data=FLAT)
    monkeypatch.setattr(arrays.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9000, 1, 8999))
    with refused(SourceError, r"compressed, takes 9\.6 KiB unpacked, of which 8\.8 KiB are free; set TMPDIR"):
        build_images(path, tmp_path / "out", size=6)


def test_an_npz_that_declares_more_than_it_holds(tmp_path):
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("data.npy", "w") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 3, 32, 32)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(1000))
    with refused(SourceError, r"1128 bytes of the \d+ of its .* values; cut off"):
        open_source(path)
    write_tree(tmp_path, {"y.npz": b"PK\5\6" + bytes(18)})
    with refused(SourceError, "found nothing"):
        open_source(tmp_path / "y.npz")
