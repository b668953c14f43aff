"""Some images of a source: which, always the same ones, and through every kind of source."""

import io
import tarfile

import numpy as np
import pytest
from pictures import class_files, noise, saved, write_tree, write_zip
from refusals import refused

from nnflow.cli import main
from nnflow.errors import DegradedWarning, InputError, StoreError
from nnflow.ingest import build_images
from nnflow.sources import open_source
from nnflow.store import ImageStore


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tree(
        tmp_path_factory.mktemp("source"), class_files(300, classes=("cat", "dog", "emu", "fox"))
    )


def paths(source, **options):
    with open_source(source, **options) as opened:
        assert len(opened.items) == len(list(opened.items)) == len(opened.items[:])
        return [item.path for item in opened.items]


def test_draws_of_one_seed_are_nested_and_in_the_order_of_the_source(folder):
    every = paths(folder)
    for seed in range(3):
        draws = [paths(folder, limit=limit, seed=seed) for limit in (1, 10, 11, 150, 299)]
        assert [len(draw) for draw in draws] == [1, 10, 11, 150, 299]
        for smaller, larger in zip(draws, [*draws[1:], every], strict=True):
            assert set(smaller) < set(larger)
        assert all(draw == sorted(draw) for draw in draws)
    assert len({tuple(paths(folder, limit=10, seed=seed)) for seed in range(20)}) == 20


def test_a_draw_is_the_same_for_ever(folder):
    """As first released: stores of a selection are to be made again, with whatever numpy."""
    wanted = ["cat/0244.png", "dog/0073.png", "emu/0106.png", "emu/0138.png", "fox/0127.png"]
    assert paths(folder, limit=5, seed=1) == wanted


def test_every_image_is_as_likely(folder):
    counts = dict.fromkeys(paths(folder), 0)
    for seed in range(200):
        for path in paths(folder, limit=30, seed=seed):
            counts[path] += 1
    found = np.array(list(counts.values()))
    # 300 binomials of mean 20 and variance 18: their variance is 18 with a standard deviation of 1.5
    assert found.sum() == 6000
    assert 13 < found.var() < 23


def test_classes_first_then_the_draw(folder):
    both = paths(folder, classes=["emu", "cat"])
    assert both == [path for path in paths(folder) if path[:3] in ("cat", "emu")]
    some = paths(folder, classes=["cat", "emu"], limit=40)
    assert len(some) == 40
    assert set(some) < set(both)
    with open_source(folder, classes=["emu"], limit=7) as source:
        assert source.classes == ("emu",)
        assert {item.group for item in source.items} == {"emu"}


def test_a_store_of_a_selection(tmp_path, folder):
    whole = ImageStore.build(folder, tmp_path / "whole", size=8)
    store = ImageStore.build(folder, tmp_path / "some", size=8, classes=["fox", "dog"], limit=50, seed=3)
    assert list(store.paths) == paths(folder, classes=["fox", "dog"], limit=50, seed=3)
    assert store.classes == ("dog", "fox")
    rows = [list(whole.paths).index(path) for path in store.paths]
    np.testing.assert_array_equal(store.pixels.numpy(), whole.pixels.numpy()[rows])


def test_through_every_kind_of_source(tmp_path, folder):
    """Positions of a view are not those of its source: blocks and orders of reading must be mapped."""
    files = class_files(120)
    images = np.stack([noise(8, 8, seed=(0, i)) for i in range(120)])
    np.savez(tmp_path / "x.npz", data=images, labels=np.array(["cat", "dog", "emu"])[np.arange(120) % 3])
    with tarfile.open(tmp_path / "x.tar", "w") as archive:  # the last first
        for name, content in reversed(files.items()):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    sources = [
        write_tree(tmp_path / "folder", files),
        write_zip(tmp_path / "x.zip", files),
        tmp_path / "x.tar",
        tmp_path / "x.npz",
    ]
    stores = [
        ImageStore.build(source, tmp_path / f"out{i}", size=8, classes=["emu", "cat"], limit=33, seed=5)
        for i, source in enumerate(sources)
    ]
    assert len({store.fingerprint for store in stores}) == 1
    assert len(stores[0]) == 33


def test_another_selection_is_another_source(tmp_path, folder):
    chosen = {"limit": 20, "classes": ["cat", "dog"], "seed": 1}
    build_images(folder, tmp_path / "out", size=8, **chosen)
    build_images(folder, tmp_path / "out", size=8, **{**chosen, "classes": ["dog", "cat", "cat"]})
    for change in ({"seed": 2}, {"limit": 21}, {"classes": ["cat", "emu"]}, {"classes": None}):
        with refused(StoreError, "another source: (digest|images)"):
            build_images(folder, tmp_path / "out", size=8, **{**chosen, **change})


def test_what_leaves_nothing_out_is_the_source_itself(folder):
    with open_source(folder) as source:
        whole = source.digest
    with open_source(folder, classes=["cat", "dog", "emu", "fox"], limit=300, seed=9) as source:
        assert source.digest == whole


def test_a_limit_beyond_the_images_takes_all_and_says_so(folder):
    with pytest.warns(DegradedWarning, match="limit 76: there are only 75 images, all are taken"):
        assert len(paths(folder, classes=["cat"], limit=76)) == 75


def test_numbers_without_their_zeros(tmp_path):
    labels = np.arange(30) % 12 + 1
    np.savez(tmp_path / "x.npz", data=np.zeros((30, 4, 4), np.uint8), labels=labels)
    assert paths(tmp_path / "x.npz", classes=["3", "12"]) == ["02", "14", "26", "11", "23"]
    with refused(InputError, "class '13': not among the 12 of this source"):
        open_source(tmp_path / "x.npz", classes=["13"])


def test_what_cannot_be_chosen(tmp_path, folder):
    with refused(InputError, "class 'foxx': not among the 4 of this source; the nearest are fox"):
        open_source(folder, classes=["cat", "foxx"])
    with refused(InputError, r"class '\\x1b': not among"):
        open_source(folder, classes=["\x1b"])
    for limit in (0, -3):
        with refused(InputError, f"limit {limit}: wanted at least one"):
            open_source(folder, limit=limit)
    with refused(InputError, "seed -1"):
        open_source(folder, limit=3, seed=-1)
    with refused(InputError, "no classes chosen"):
        open_source(folder, classes=[])
    flat = write_tree(tmp_path / "flat", {"a.png": saved(noise(4, 4))})
    with refused(InputError, "class 'cat': the images of this source have no classes"):
        open_source(flat, classes=["cat"])


def test_on_the_command_line(tmp_path, capsys):
    files = {f"{group}/{i}.png": saved(noise(4, 4, seed=i)) for group in ("a, b", "c", "d") for i in range(6)}
    source = write_tree(tmp_path / "s", files)
    arguments = [
        "index",
        str(source),
        str(tmp_path / "o"),
        "--size",
        "4",
        "--rank",
        "2",
        "--calibration-seconds",
        "0",
    ]
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--classes", '"a, b",c', "--limit", "9", "--seed", "2"])
    assert done.value.code == 0
    store = ImageStore.open(tmp_path / "o")
    assert store.classes == ("a, b", "c")
    assert list(store.paths) == paths(source, classes=["c", "a, b"], limit=9, seed=2)
    for wrong in ("", '"a', "a,,b"):
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            main([*arguments, "--classes", wrong])
        assert done.value.code == 2
        assert "wanted names of classes" in capsys.readouterr().err
