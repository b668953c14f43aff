"""Parquet tables as the Hugging Face hub has them: columns, row groups, and what is refused."""

import builtins
import json
import sys
import threading

import numpy as np
import pytest
from pictures import class_files, noise, saved, write_tree
from refusals import refused

from nnflow.errors import MissingExtraError, SourceError
from nnflow.ingest import build_images
from nnflow.sources import UnreadableImageError, open_source, parquet
from nnflow.store import ImageStore

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

NAMES = ["fox", "cat", "emu", "dog"]  # of the labels 0, 1, 2, 3; no image shows a fox
PIXEL = saved(noise(1, 1))


def features(**columns):
    """Schema metadata as `datasets` writes them."""
    return {b"huggingface": json.dumps({"info": {"features": columns}}).encode()}


HUB = features(
    image={"_type": "Image"},
    label={"names": NAMES, "_type": "ClassLabel"},
    text={"dtype": "string", "_type": "Value"},
)


def write_table(path, metadata=None, rows=7, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=rows)
    return path


def structs(contents):
    return [{"bytes": content, "path": f"{i}.png"} for i, content in enumerate(contents)]


def write_hub(folder, files, parts=3, **options):
    """`files`, {class/number.png: bytes}, as a split of the hub."""
    every = list(files.items())
    for part, rows in enumerate(np.array_split(np.arange(len(every)), parts)):
        write_table(
            folder / f"train-{part:05d}-of-{parts:05d}.parquet",
            HUB,
            text=[every[row][0] for row in rows],
            image=structs(every[row][1] for row in rows),
            label=[NAMES.index(every[row][0].split("/")[0]) for row in rows],
            **options,
        )
    return folder


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


def test_a_folder_of_the_hub_gives_the_store_of_the_folder(tmp_path, files, wanted):
    write_hub(tmp_path / "repository/data", files)
    write_tree(tmp_path / "repository", {"README.md": b"", ".gitattributes": b""})
    store = ImageStore.build(tmp_path / "repository", tmp_path / "out", size=8)
    same_images(store, wanted)
    assert store.paths[1] == "train-00000-of-00003.parquet/03"
    by_file = tmp_path / "repository/data/train-00001-of-00003.parquet"
    one = ImageStore.build(by_file, tmp_path / "one", size=8)
    assert len(one) == 40
    assert one.paths[0] == "02"  # row 42 of all, a cat


def test_plain_bytes_and_plain_labels(tmp_path, files, wanted):
    """As img2dataset writes tables, and others by hand."""
    contents, groups = list(files.values()), [path[:3] for path in files]
    numbers = [NAMES.index(group) + 8 for group in groups]
    path = write_table(tmp_path / "a.parquet", key=["k"] * 120, jpg=contents, **{"class": groups})
    same_images(ImageStore.build(path, tmp_path / "a", size=8), wanted)
    path = write_table(tmp_path / "b.parquet", mask=[b"x"] * 120, img=contents, fine_label=numbers)
    with open_source(path) as source:
        assert source.classes == ("09", "10", "11")
        assert [item.group for item in source.items] == ["09"] * 40 + ["10"] * 40 + ["11"] * 40
    large = pa.array(contents, pa.large_binary())
    path = write_table(tmp_path / "c.parquet", image=large, label=pa.array(numbers, pa.uint8()))
    with open_source(path) as source:
        assert source.classes == ("09", "10", "11")
        assert {source.read(item) for item in source.items} == set(contents)
    with open_source(write_table(tmp_path / "d.parquet", image=contents, score=[0.5] * 120)) as source:
        assert source.classes == ()


def test_which_columns_are_taken(tmp_path):
    """CIFAR-100 has two labels; the metadata say which integers are classes."""
    two = [{"bytes": PIXEL, "path": None}] * 2
    cifar = features(
        img={"_type": "Image"},
        fine_label={"_type": "ClassLabel", "names": ["apple", "aquarium"]},
        coarse_label={"_type": "ClassLabel", "names": ["fish", "fruit"]},
    )
    path = write_table(tmp_path / "x.parquet", cifar, img=two, coarse_label=[1, 0], fine_label=[0, 1])
    with open_source(path) as source:
        assert source.classes == ("apple", "aquarium")
    named = features(photo={"_type": "Image"}, kind={"_type": "ClassLabel", "names": ["a", "b"]})
    path = write_table(
        tmp_path / "x.parquet", named, photo=two, kind=[1, 0], image=[b"no", b"no"], label=[5, 6]
    )
    with open_source(path) as source:
        assert [item.group for item in source.items] == ["a", "b"]
        assert source.read(source.items[0]) == PIXEL
    odd = features(one={"_type": "Image"}, two={"_type": "Image"})
    with refused(SourceError, r"x\.parquet: one, two could all be the images; name one of them image"):
        open_source(write_table(tmp_path / "x.parquet", odd, one=two, two=two))
    odd = features(a={"_type": "ClassLabel", "names": ["a"]}, b={"_type": "ClassLabel", "names": ["b"]})
    with refused(SourceError, "a, b could all be the labels; name one of them label"):
        open_source(write_table(tmp_path / "x.parquet", odd, image=two, a=[0, 0], b=[0, 0]))


def test_names_that_are_not_distinct_are_numbers(tmp_path):
    twice = features(label={"_type": "ClassLabel", "names": ["crane"] * 11})
    with open_source(write_table(tmp_path / "x.parquet", twice, image=[PIXEL] * 2, label=[10, 3])) as source:
        assert source.classes == ("03", "10")


@pytest.mark.parametrize(
    "metadata", [b"", b"{", b"[1]", b'{"info": 3}', b'{"info": {"features": {"image": 1}}}']
)
def test_metadata_that_say_nothing(tmp_path, metadata):
    path = write_table(tmp_path / "x.parquet", {b"huggingface": metadata}, image=structs([PIXEL]), label=[2])
    with open_source(path) as source:
        assert source.classes == ("2",)


def test_minus_one_is_no_label(tmp_path):
    path = write_table(tmp_path / "x.parquet", HUB, image=structs([PIXEL] * 2), label=[-1, -1])
    with open_source(path) as source:
        assert source.classes == ()
    for label, words in (
        ([2, -1], r"no label \(none, or -1\)"),
        ([1, None], r"no label \(none, or -1\)"),
        ([0, 4], "the label 4, .*0 to 3"),
    ):
        with refused(SourceError, rf"row 1 of x\.parquet has {words}"):
            open_source(write_table(tmp_path / "x.parquet", HUB, image=structs([PIXEL] * 2), label=label))
    with refused(SourceError, "row 1 has no label, others have"):
        open_source(write_table(tmp_path / "x.parquet", image=structs([PIXEL] * 2), label=["a", None]))
    for part, label in enumerate(([1, 2], [-1, -1])):
        write_table(tmp_path / "s" / f"{part}.parquet", HUB, image=structs([PIXEL] * 2), label=label)
    with refused(SourceError, r"1\.parquet has no labels, others have"):
        open_source(tmp_path / "s")


@pytest.mark.parametrize(("workers", "kept"), [(1, 1), (2, 1 << 28), (8, 1 << 28)])
def test_each_row_group_is_read_once(tmp_path, files, monkeypatch, workers, kept):
    """The store goes by class, and every class is in every row group."""
    monkeypatch.setattr(parquet, "_KEPT_BYTES", kept)
    source = write_hub(tmp_path / "data", files, rows=10)
    seen = []
    real = parquet._Table.images

    def images(self, group):
        seen.append((self.path.name, group))
        return real(self, group)

    monkeypatch.setattr(parquet._Table, "images", images)
    monkeypatch.setattr("nnflow.ingest._CHUNK_ITEMS", 4)
    build_images(source, tmp_path / "out", size=8, workers=workers)
    assert len(seen) == 12
    assert sorted(seen) == sorted(set(seen))
    if workers == 1:
        assert seen == sorted(seen)


def test_few_row_groups_are_kept(tmp_path, files, monkeypatch):
    monkeypatch.setattr(parquet, "_KEPT_BYTES", 1)
    source = write_hub(tmp_path / "data", files, rows=4)
    with open_source(source) as opened:
        order = opened.reading_order(np.arange(120))
        assert sorted(order.tolist()) == list(range(120))
        before = pa.total_allocated_bytes()
        most = 0
        for position in order.tolist():
            opened.read(opened.items[position])
            most = max(most, pa.total_allocated_bytes() - before)
        group = 4 * max(map(len, files.values()))
        assert most < (parquet._KEPT + 2) * 2 * group  # of 30 groups


def test_from_any_thread_in_any_order(tmp_path, files):
    source = write_hub(tmp_path / "data", files, rows=3)
    contents = list(files.values())
    wrong = []
    with open_source(source) as opened:

        def reading(seed):
            for position in np.random.default_rng(seed).integers(0, 120, 150).tolist():
                item = opened.items[position]
                part, row = item.path.split("/")
                if opened.read(item) != contents[40 * int(part[6:11]) + int(row)]:
                    wrong.append(item.path)

        threads = [threading.Thread(target=reading, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_row_without_bytes_is_one_unreadable_image(tmp_path, files):
    contents = [*files.values()][:20]
    rows = structs(contents)
    rows[5], rows[13] = {"bytes": None, "path": "elsewhere.png"}, None
    for images in (rows, [row and row["bytes"] for row in rows]):
        path = write_table(tmp_path / "x.parquet", image=images)
        for workers in (1, 4):
            with refused(
                UnreadableImageError, r"05: row 5 of x\.parquet is without bytes; pass --skip-unreadable"
            ):
                build_images(path, tmp_path / "out", size=8, workers=workers)
        store = ImageStore.build(path, tmp_path / "out", size=8, skip_unreadable=True)
        assert len(store) == 18
        assert (tmp_path / "out/skipped.csv").read_text().splitlines()[1:] == [
            "05,row 5 of x.parquet is without bytes",
            "13,row 13 of x.parquet is without bytes",
        ]
        (tmp_path / "out/images.h5").unlink()


def test_digest_names_the_content_not_the_place(tmp_path, files):
    def digest(path):
        with open_source(path) as source:
            return source.digest

    first = digest(write_hub(tmp_path / "a", files))
    assert digest((tmp_path / "a").rename(tmp_path / "b")) == first
    longer = dict(files)
    longer["cat/0003.png"] += b"x"
    others = [
        write_hub(tmp_path / "c", longer),
        write_hub(
            tmp_path / "d", {("dog" + k[3:] if k == "cat/0003.png" else k): v for k, v in files.items()}
        ),
        write_hub(tmp_path / "e", files, parts=2),
        write_hub(tmp_path / "f", files, rows=8),
    ]
    assert len({first, *map(digest, others)}) == 5


def test_two_splits_are_refused_and_a_pattern_chooses(tmp_path, files, wanted):
    write_hub(tmp_path / "data", files)
    write_table(tmp_path / "data/test-00000-of-00001.parquet", HUB, image=structs([PIXEL]), label=[-1])
    with refused(
        SourceError, r"different splits; choose one by a pattern in quotes, such as '.*/data/test\*'"
    ):
        open_source(tmp_path)
    same_images(ImageStore.build(tmp_path / "data/train-*.parquet", tmp_path / "out", size=8), wanted)


def test_tables_that_do_not_fit_together(tmp_path):
    write_table(tmp_path / "1.parquet", HUB, image=structs([PIXEL]), label=[1])
    write_table(tmp_path / "2.parquet", jpg=[PIXEL], label=[1])
    words = r"2\.parquet: images and labels are in jpg and label, .*1\.parquet in image and label of 4 named"
    with refused(SourceError, words):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (
            {"url": ["http"], "label": [1]},
            r"no column of images among url \(string\), label \(int64\); wanted",
        ),
        ({"image": ["a path"]}, r"no column of images among image \(string\)"),
        ({"image": [[1, 2]]}, "no column of images"),
        ({"data": [b"x"]}, r"no column of images among data \(binary\)"),
        ({"image": pa.array([], pa.binary())}, "no images, the tables are empty"),
    ],
)
def test_what_is_no_table_of_images(tmp_path, columns, words):
    with refused(SourceError, rf"x\.parquet: {words}"):
        open_source(write_table(tmp_path / "x.parquet", **columns))


def test_truncated_anywhere_is_refused(tmp_path):
    whole = write_table(tmp_path / "x.parquet", HUB, image=structs([PIXEL] * 9), label=[1] * 9).read_bytes()
    for length in [0, 3, 4, 11, 12, 200, len(whole) // 2, len(whole) - 9, len(whole) - 1]:
        (tmp_path / "x.parquet").write_bytes(whole[:length])
        with refused(SourceError, r"x\.parquet: cannot be read \(.*\); fetch it anew"):
            open_source(tmp_path / "x.parquet")


def test_a_damaged_row_group_costs_its_images_only(tmp_path):
    contents = [saved(noise(8, 8, seed=i)) for i in range(20)]
    path = write_table(tmp_path / "x.parquet", rows=5, image=structs(contents))
    place = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    raw = bytearray(path.read_bytes())
    raw[place : place + 30] = b"\xff" * 30
    path.write_bytes(raw)
    with refused(UnreadableImageError, r"05: .*x\.parquet: cannot be read \(.*pass --skip-unreadable"):
        build_images(path, tmp_path / "out", size=8, workers=3)
    store = ImageStore.build(path, tmp_path / "out", size=8, skip_unreadable=True)
    assert list(store.paths) == [f"{row:02d}" for row in range(20) if not 5 <= row < 10]


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    path = write_table(tmp_path / "x.parquet", image=[PIXEL])
    real = builtins.__import__

    def missing(name, *rest):
        if name.startswith("pyarrow"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest)

    for name in [name for name in sys.modules if name.startswith("pyarrow")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(builtins, "__import__", missing)
    with refused(MissingExtraError, r"need pyarrow, .*run: pip install 'nnflow\[parquet\]'"):
        open_source(path)
