"""ImageStore: what comes out is what went in, and no broken file opens."""

import json
import subprocess
import sys
import warnings

import h5py
import numpy as np
import pytest
import torch
from pictures import class_files, noise, saved, write_tree

from nnflow.errors import InputError, StoreError
from nnflow.hdf5file import read_header
from nnflow.store import ImageStore, to_float, to_uint8
from nnflow.texts import Texts
from nnflow.unsealed import runs


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    files = class_files(50, size=5, classes=("a", "b", "c", "d"))
    return ImageStore.build(write_tree(root / "source", files), root / "out", size=5)


@pytest.fixture
def copy(store, tmp_path):
    path = tmp_path / "images.h5"
    path.write_bytes((store.folder / "images.h5").read_bytes())
    return path


def test_codec_is_exact_at_every_level_and_rounds_between():
    levels = torch.arange(256, dtype=torch.uint8)
    values = to_float(levels)
    wanted = [float(np.float64(level) / 127.5 - 1) for level in range(256)]
    assert values.dtype == torch.float32
    assert values.tolist() == pytest.approx(wanted, abs=6e-8)
    assert (values[0], values[255]) == (-1, 1)
    assert torch.equal(to_uint8(values), levels)
    assert torch.equal(to_uint8(values + 0.49 / 127.5), levels)
    assert torch.equal(to_uint8(values - 0.49 / 127.5), levels)
    odd = torch.tensor([-7.0, 7.0, -torch.inf, torch.inf, torch.nan])
    assert to_uint8(odd).tolist() == [0, 255, 0, 255, 0]
    assert to_uint8(values.double()).tolist() == levels.tolist()


def test_codec_leaves_its_argument_alone():
    values, levels = torch.zeros(3), torch.zeros(3, dtype=torch.uint8)
    to_uint8(values)
    to_float(levels)
    assert values.tolist() == [0, 0, 0]
    assert levels.tolist() == [0, 0, 0]


def test_images_are_the_files_pixels_in_any_order(store):
    ids = torch.tensor([49, 0, 7, 7, 31])
    images = store.images(ids)
    assert images.dtype == torch.float32
    for image, row in zip(images, ids.tolist(), strict=True):
        number = int(store.paths[row][2:6])
        wanted = noise(5, 5, seed=(0, number)).transpose(2, 0, 1).astype(np.float64) / 127.5 - 1
        np.testing.assert_allclose(image.numpy(), wanted, atol=1e-7)
    assert store.images(torch.tensor([], dtype=torch.int64)).shape == (0, 3, 5, 5)


def test_images_cannot_change_the_store(store):
    ids = torch.arange(3)
    before = store.images(ids).clone()
    store.images(ids).fill_(0)
    assert torch.equal(store.images(ids), before)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.tensor([0, 50]), "from 0 to 50: wanted 0 to 49"),
        (torch.tensor([-1]), "wanted 0 to 49"),
        (torch.tensor(3), "shape"),
        (torch.tensor([[3]]), "shape"),
        (torch.tensor([1.0]), "float32"),
        (torch.tensor([1], dtype=torch.int32), "int32"),
    ],
)
def test_wrong_ids(store, ids, words):
    with pytest.raises(InputError, match=words):
        store.images(ids)


def test_a_class_is_a_slice(store):
    assert store.classes == ("a", "b", "c", "d")
    covered = []
    for label, name in enumerate(store.classes):
        rows = store.class_rows(label)
        assert {path.split("/")[0] for path in store.paths[rows]} == {name}
        covered += range(50)[rows]
    assert covered == list(range(50))
    for label in (-1, 4):
        with pytest.raises(InputError, match="0 to 3"):
            store.class_rows(label)


def test_without_classes(tmp_path):
    source = write_tree(tmp_path / "s", {"1.png": saved(noise(4, 4))})
    store = ImageStore.build(source, tmp_path / "out", size=4)
    assert store.labels.tolist() == [-1]
    assert store.labels.dtype == torch.int64
    with pytest.raises(InputError, match="none"):
        store.class_rows(0)


def test_open_is_build(store):
    for path in (store.folder, store.folder / "images.h5", str(store.folder)):
        opened = ImageStore.open(path)
        assert opened.fingerprint == store.fingerprint
        assert opened.shape == store.shape == (50, 3, 5, 5)
        assert opened.folder == store.folder
        assert len(opened) == 50
        assert torch.equal(opened.pixels, store.pixels)
        assert torch.equal(opened.labels, store.labels)
        assert list(opened.paths) == list(store.paths)
        assert "50 images" in repr(opened)


def test_opening_warns_of_nothing_and_keeps_the_filters(store):
    before = list(warnings.filters)
    ImageStore.open(store.folder)
    assert warnings.filters == before
    code = f"import warnings; warnings.simplefilter('error'); from nnflow.store import ImageStore; ImageStore.open({str(store.folder)!r})"  # noqa: E501
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.returncode == 0


def test_fingerprint_is_of_content(store, tmp_path):
    files = class_files(50, size=5, classes=("a", "b", "c", "d"))

    def fingerprint(name, files, **options):
        source = write_tree(tmp_path / name, files)
        return ImageStore.build(source, tmp_path / f"{name}-out", size=5, **options).fingerprint

    renamed = {path.replace("/0", "/x0"): content for path, content in files.items()}
    assert fingerprint("same", renamed) == store.fingerprint  # other paths, equal images
    reclassed = {path.replace("a/", "aa/"): content for path, content in files.items()}
    path = next(iter(files))
    one_pixel = noise(5, 5, seed=(0, 0))
    one_pixel[4, 4, 2] ^= 1
    relabelled = {("a/9999.png" if p == "b/0001.png" else p): c for p, c in files.items()}
    others = [
        fingerprint("reclassed", reclassed),
        fingerprint("pixel", {**files, path: saved(one_pixel)}),
        fingerprint("fewer", dict(list(files.items())[:-1])),
        fingerprint("relabelled", relabelled),
        fingerprint("grey", files, grey=True),
        store.fingerprint,
    ]
    assert len(set(others)) == len(others)


def test_other_tools_read_the_file(store):
    with h5py.File(store.folder / "images.h5") as file:
        np.testing.assert_array_equal(file["images"][...].reshape(50, -1), store.pixels.numpy())
        np.testing.assert_array_equal(file["labels"][...], store.labels.numpy())
        assert file["images"].chunks is None


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_one_line(copy, share):
    whole = copy.read_bytes()
    copy.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(StoreError) as error:
        ImageStore.open(copy)
    assert str(error.value).isprintable()
    assert "images.h5" in str(error.value)
    assert "build it anew" in str(error.value)


def test_one_missing_byte_is_noticed(copy):
    copy.write_bytes(copy.read_bytes()[:-1])
    with pytest.raises(StoreError, match="truncated or damaged"):
        ImageStore.open(copy)


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(StoreError, match="no such file"):
        ImageStore.open(tmp_path / "nothing")
    with pytest.raises(StoreError, match="no such file"):
        ImageStore.open(tmp_path)
    (tmp_path / "images.h5").write_bytes(saved(noise(50, 50)))
    with pytest.raises(StoreError, match="foreign"):
        ImageStore.open(tmp_path)
    with h5py.File(tmp_path / "images.h5", "w") as file:
        file["images"] = np.zeros((3, 3, 4, 4), np.uint8)
    with pytest.raises(StoreError, match="foreign"):
        ImageStore.open(tmp_path)


def rewritten(copy, **changes):
    """The file with another first line, as a hostile writer would make it."""
    whole = copy.read_bytes()
    about = json.loads(whole[:960])
    about = {key: value for key, value in {**about, **changes}.items() if value is not None}
    copy.write_bytes(json.dumps(about).encode().ljust(960) + whole[960:])


def place(name, at, length):
    def change(copy):
        places = json.loads(copy.read_bytes()[:960])["places"]
        rewritten(copy, places={**places, name: [at, length]})

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 3}, "version 3 of nnflow's images, wanted 1 or 2"),
        ({"version": 2}, "dtype"),
        ({"version": "x\n"}, "version"),
        ({"format": "other"}, "foreign"),
        ({"recipe": None}, "recipe"),
        ({"recipe": {"a": 1}}, "damaged"),
        ({"places": None}, "places"),
        ({"shape": [50, 3, 5, 6]}, "do not fit|digest"),
        ({"shape": [50, 75]}, "damaged"),
        ({"shape": [0, 3, 5, 5]}, "do not fit"),
        ({"shape": [-50, -3, 5, 5]}, "do not fit"),
        ({"shape": [10**30, 3, 5, 5]}, "do not fit"),
        ({"shape": [49, 3, 5, 5]}, "digest"),
        ({"shape": "many"}, "damaged"),
        ({"pixels_at": 0}, "do not fit"),
        ({"pixels_at": 1e400}, "damaged"),
        ({"bytes": 7}, "wanted 7"),
        ({"digest": "0"}, "digest"),
        (place("labels", 1024, 49), "49 labels"),
        (place("labels", 1024, 50), "labels"),
        (place("labels", -8, 50), "before the file"),
        (place("paths", 10**12, 50), "beyond the file"),
        (place("paths_ends", 1024, 50), "paths"),
    ],
)
def test_inconsistent_files(copy, change, words):
    if callable(change):
        change(copy)
    else:
        rewritten(copy, **change)
    with pytest.raises(StoreError, match=words) as error:
        ImageStore.open(copy)
    assert str(error.value).isprintable()


def test_a_file_without_fingerprint_is_not_finished(copy):
    whole = copy.read_bytes()
    copy.write_bytes(whole[:960] + bytes(64) + whole[1024:])
    with pytest.raises(StoreError, match="not finished"):
        ImageStore.open(copy)
    for mark in (b"x" * 64, b"\xff" * 64, b"0" * 63 + b"\0"):
        copy.write_bytes(whole[:960] + mark + whole[1024:])
        with pytest.raises(StoreError, match="damaged"):
            ImageStore.open(copy)


def opens(path):
    try:
        ImageStore.open(path)
    except StoreError as error:
        return not str(error).isprintable()
    return True


def test_random_damage_never_raises_anything_else(copy):
    whole = np.frombuffer(copy.read_bytes(), np.uint8)
    start = read_header(copy).pixels_at
    random = np.random.default_rng(0)
    for _ in range(300):
        broken = whole.copy()
        broken[random.integers(1024, start)] ^= random.integers(1, 256, dtype=np.uint8)
        copy.write_bytes(broken.tobytes())
        assert not opens(copy)
    for _ in range(300):
        broken = whole.copy()
        broken[random.integers(0, 1000, 4)] = random.integers(0, 256, 4)
        copy.write_bytes(broken.tobytes())
        opens(copy)  # perhaps; but nothing else is raised
    copy.write_bytes(whole.tobytes())
    assert opens(copy)


def test_texts_keep_every_string():
    texts = ["", "a", "ü" * 300, "line\nend", "\udcff\udc80", "a/b", ""]
    packed = Texts.of(texts)
    assert list(packed) == texts
    assert packed[-2] == "a/b"
    assert packed[1:4] == texts[1:4]
    assert list(Texts.of([])) == []
    with pytest.raises(IndexError):
        packed[7]


def test_runs():
    assert list(runs([])) == []
    assert list(runs([3])) == [(3, 1)]
    assert list(runs([0, 1, 2, 5, 6, 9])) == [(0, 3), (5, 2), (9, 1)]
    assert list(runs([0, 1, 2, 3, 4, 7], 2)) == [(0, 2), (2, 2), (4, 1), (7, 1)]
