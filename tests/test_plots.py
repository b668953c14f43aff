"""Pictures read back from their files: the right pixels in their places, the same bytes twice."""

import dataclasses
import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from nnflow.errors import InputError, StoreError
from nnflow.evaluation import Evaluation, Nearness
from nnflow.metrics import DistanceHistogram, MemorisedFraction, VelocityError
from nnflow.plots import Column, comparison, distance_histogram, error_over_time, sample_grid


def random_images(count, shape, seed=0):
    """uint8 (S, C, H, W), every image full of its own pixels, and the same as floats."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, *shape), dtype=torch.uint8, generator=generator)
    return pixels, pixels.float() / 127.5 - 1


def column(name, shape, seeds=3, seed=0):
    _, images = random_images(seeds, shape, seed)
    _, nearest = random_images(seeds, shape, seed + 1000)
    return Column(name=name, images=images, nearest=nearest, distances=torch.arange(seeds) + 0.5)


def read(path):
    with Image.open(path) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        return np.asarray(image)


def enlarged(pixels, times):
    """Nearest-neighbour enlargement by Pillow, which shares no code with ours."""
    array = pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    height, width = array.shape[:2]
    image = Image.fromarray(array).resize((width * times, height * times), Image.Resampling.NEAREST)
    return np.asarray(image)


def place_of(tile, picture):
    """(top, left) of the one place at which `tile` stands in `picture`; None when nowhere."""
    height, width = tile.shape[:2]
    hits = np.argwhere((picture == tile[0, 0]).all(-1))
    found = [
        (int(top), int(left))
        for top, left in hits
        if np.array_equal(picture[top : top + height, left : left + width], tile)
    ]
    assert len(found) <= 1, found
    return found[0] if found else None


def test_place_of_finds_and_refuses():
    picture = np.arange(300, dtype=np.uint8).reshape(10, 10, 3)
    assert place_of(picture[4:6, 3:7], picture) == (4, 3)
    assert place_of(picture[4:6, 3:7] + 1, picture) is None


# ----- grid


@pytest.mark.parametrize(("shape", "times"), [((1, 8, 8), 16), ((3, 32, 32), 4), ((3, 5, 5), 26)])
def test_grid_holds_each_image_in_reading_order(tmp_path, shape, times):
    pixels, images = random_images(7, shape)
    sample_grid(images, tmp_path / "grid.png", columns=3)
    picture = read(tmp_path / "grid.png")
    places = [place_of(enlarged(image, times), picture) for image in pixels]
    assert None not in places
    assert places == sorted(places)
    tops, lefts = zip(*places, strict=True)
    assert [tops.index(top) for top in tops] == [0, 0, 0, 3, 3, 3, 6]
    assert [lefts.index(left) for left in lefts] == [0, 1, 2, 0, 1, 2, 0]


def test_large_images_keep_their_size(tmp_path):
    pixels, images = random_images(2, (3, 256, 256))
    sample_grid(images, tmp_path / "grid.png", columns=2)
    assert place_of(enlarged(pixels[1], 1), read(tmp_path / "grid.png")) is not None


def test_values_outside_the_range_are_clamped(tmp_path):
    images = torch.full((1, 1, 8, 8), 1.7)
    images[0, 0, :, :4] = -9.0
    sample_grid(images, tmp_path / "grid.png", columns=1)
    expected = torch.full((1, 8, 8), 255, dtype=torch.uint8)
    expected[:, :, :4] = 0
    assert place_of(enlarged(expected, 16), read(tmp_path / "grid.png")) == (4, 4)


def test_captions_stand_below_their_images(tmp_path):
    pixels, images = random_images(4, (1, 8, 8))
    sample_grid(images, tmp_path / "grid.png", columns=2, captions=["iii", "", "WWWW", "x"])
    picture = read(tmp_path / "grid.png")
    ink = []
    for image in pixels:
        top, left = place_of(enlarged(image, 16), picture)
        below = picture[top + 130 : top + 128 + 28, left : left + 128]
        ink.append(int((below < 128).sum()))
    assert ink[1] == 0
    assert 0 < ink[0] < ink[2]
    assert 0 < ink[3] < ink[2]


@pytest.mark.parametrize(
    "caption",
    [
        "$x$/0001.png",
        "cost $5",
        "$",
        r"\$ \frac{",
        "a\nb\x1b[31m",
        "\udcff.png",
        "猫/1.png",
        "w" * 400,
    ],
)
def test_any_file_name_is_a_caption(tmp_path, caption):
    pixels, images = random_images(2, (1, 8, 8))
    sample_grid(images, tmp_path / "grid.png", columns=2, captions=[caption, ""])
    picture = read(tmp_path / "grid.png")
    top, left = place_of(enlarged(pixels[0], 16), picture)
    assert (picture[top + 130 : top + 156, left : left + 128] < 128).any()
    # It keeps to its own column, however long it is.
    assert (picture[top + 130 : top + 156, left + 131 :] == 255).all()


def test_dollars_are_drawn_as_dollars(tmp_path):
    """As mathematics, $ would vanish: the same ink as without it."""
    _, images = random_images(1, (1, 8, 8))
    for name, caption in (("with", "$x$"), ("without", "x")):
        sample_grid(images, tmp_path / f"{name}.png", columns=1, captions=[caption])
    ink = {name: (read(tmp_path / f"{name}.png") < 128).sum() for name in ("with", "without")}
    assert ink["with"] > ink["without"] + 50


# ----- comparison


@pytest.mark.parametrize(
    ("shape", "times"), [((1, 8, 8), 20), ((3, 32, 32), 5), ((1, 28, 28), 6), ((3, 256, 256), 1)]
)
def test_comparison_has_a_row_for_each_seed_and_a_pair_for_each_column(tmp_path, shape, times):
    names = ("u* (memorised)", "u_theta (generalised)")
    columns = [column(name, shape, seeds=2, seed=i) for i, name in enumerate(names)]
    comparison(columns, tmp_path / "main.png", seeds=[3, 11], n=50_000)
    picture = read(tmp_path / "main.png")
    places = {}
    for i in range(2):
        samples, _ = random_images(2, shape, i)
        nearest, _ = random_images(2, shape, i + 1000)
        for row in range(2):
            places[row, i, 0] = place_of(enlarged(samples[row], times), picture)
            places[row, i, 1] = place_of(enlarged(nearest[row], times), picture)
    assert None not in places.values()
    side = shape[1] * times
    for row in range(2):
        tops = {places[row, i, k][0] for i in range(2) for k in range(2)}
        assert len(tops) == 1
        lefts = [places[row, i, k][1] for i in range(2) for k in range(2)]
        assert lefts == sorted(lefts)
        for i in range(2):
            between = places[row, i, 1][1] - places[row, i, 0][1] - side
            assert 0 < between < side / 10  # a sample and its nearest stand close together
            if i:
                apart = places[row, i, 0][1] - places[row, i - 1, 1][1] - side
                assert apart > 2 * between
    assert places[0, 0, 0][0] + side < places[1, 0, 0][0]
    assert {places[0, i, k][1] for i in range(2) for k in range(2)} == {
        places[1, i, k][1] for i in range(2) for k in range(2)
    }


def ink_below(picture, place, side, height):
    top, left = place
    return int((picture[top + side + 2 : top + side + height, left : left + side] < 128).sum())


def test_distances_stand_below_the_nearest_images(tmp_path):
    made = column("u*", (1, 8, 8))
    samples, _ = random_images(3, (1, 8, 8))
    nearest, _ = random_images(3, (1, 8, 8), 1000)
    long = Column(
        name="u*",
        images=made.images,
        nearest=made.nearest,
        distances=torch.tensor([0.0, 1234.5, 0.0]),
    )
    comparison([long], tmp_path / "a.png", seeds=[0, 1, 2], n=9)
    picture = read(tmp_path / "a.png")
    ink = [ink_below(picture, place_of(enlarged(x, 20), picture), 160, 36) for x in nearest]
    assert ink[0] == ink[2]
    assert 0 < ink[0] < ink[1]
    assert [ink_below(picture, place_of(enlarged(x, 20), picture), 160, 36) for x in samples] == [
        0,
        0,
        0,
    ]


def test_headings_seeds_and_count_are_drawn(tmp_path):
    """Changing one of them changes the picture in its own place and nowhere else."""

    def draw(name="u*", seeds=(1, 2, 3), n=9):
        comparison([column(name, (1, 8, 8))], tmp_path / "x.png", seeds=list(seeds), n=n)
        return read(tmp_path / "x.png").astype(int)

    base = draw()
    tile, _ = random_images(3, (1, 8, 8))
    top, left = place_of(enlarged(tile[0], 20), base.astype(np.uint8))
    for other, rows, columns in (
        (draw(name="tau"), slice(110, top), slice(left, None)),
        (draw(seeds=(8, 2, 3)), slice(top, top + 160), slice(0, left)),
        (draw(n=123), slice(0, 110), slice(None)),
    ):
        changed = (base != other).any(-1)
        assert changed[rows, columns].any()
        changed[rows, columns] = False
        assert not changed.any()


@pytest.mark.parametrize("name", ["$", "$x$ = $5", "a\nb", r"u* \$ tau", "猫", "w" * 300, ""])
def test_any_name_is_a_heading(tmp_path, name):
    pair = [column(name, (1, 8, 8), 2), column("", (1, 8, 8), 2, seed=5)]
    comparison(pair, tmp_path / "x.png", seeds=[0, 1], n=9)
    picture = read(tmp_path / "x.png")
    tile, _ = random_images(2, (1, 8, 8), 5)
    top, left = place_of(enlarged(tile[0], 20), picture)
    heading = slice(top - 110, top - 52)
    assert (picture[heading, left:] == 255).all()  # it keeps out of its neighbour's place
    assert bool((picture[heading, :left] < 128).any()) == bool(name)


def test_symbols_are_set_as_symbols(tmp_path):
    """u_theta as a word would be far wider than u with a subscript."""

    def width(name):
        comparison([column(name, (1, 8, 8), 1)], tmp_path / "x.png", seeds=[0], n=9)
        picture = read(tmp_path / "x.png")
        tile, _ = random_images(1, (1, 8, 8))
        top, _ = place_of(enlarged(tile[0], 20), picture)
        inked = (picture[top - 110 : top - 52] < 128).any((0, 2)).nonzero()[0]
        return inked.max() - inked.min()

    assert width("u_theta") < width("u_thetas") / 2
    assert width("tau") < width("taus") / 2
    assert width("p_t") < width("p_ts") / 1.3
    assert width("$x$") > 2 * width("x")  # and a dollar as a dollar


def test_sixteen_rows_and_one_row(tmp_path):
    for seeds in (1, 16):
        comparison([column("u*", (3, 32, 32), seeds)], tmp_path / "x.png", seeds=list(range(seeds)), n=9)
        picture = read(tmp_path / "x.png")
        samples, _ = random_images(seeds, (3, 32, 32))
        places = [place_of(enlarged(sample, 5), picture) for sample in samples]
        assert None not in places
        assert places == sorted(places)


# ----- curves and histograms


def nearness(counts, memorised):
    images = sum(counts)
    return Nearness(
        memorised=MemorisedFraction(
            fraction=memorised / images,
            low=0.1,
            high=0.9,
            memorised=memorised,
            images=images,
            ratio=1 / 3,
        ),
        copies=0,
        histogram=DistanceHistogram(edges=(0.0, 1.0, 2.0, 3.0, 4.0), counts=counts),
    )


def velocity_error(scale):
    times = (0.0, 0.5, 0.99)
    values = tuple(scale * value for value in (0.1, 0.2, 0.3))
    return VelocityError(
        times=times,
        mean_squared=values,
        relative_p50=values,
        relative_p90=tuple(2 * value for value in values),
        cosine=(1.0, 1.0, 1.0),
        pairs=8,
    )


def evaluation(**changes):
    values = {
        "samples": nearness((8, 0, 0, 2), 8),
        "held_out": nearness((0, 1, 3, 0), 0),
        "error": velocity_error(1.0),
        "held_out_error": velocity_error(30.0),
    }
    return Evaluation(
        n=100,
        shape=(3, 4, 4),
        fingerprint="x",
        seed=0,
        sample_seeds=(0, 1, 2, 5),
        **{**values, **changes},
    )


def has_colour(picture, colour):
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((picture == rgb).all(-1).sum())


BLUE, ORANGE = "#0072B2", "#D55E00"


@pytest.mark.parametrize("draw", [distance_histogram, error_over_time])
def test_a_curve_is_drawn_for_each_set_given(tmp_path, draw):
    nothing = {"samples": None, "error": None}
    draw(evaluation(), tmp_path / "both.png")
    draw(evaluation(held_out=None, held_out_error=None), tmp_path / "one.png")
    draw(evaluation(**nothing), tmp_path / "other.png")
    both, one, other = (read(tmp_path / f"{name}.png") for name in ("both", "one", "other"))
    assert has_colour(both, BLUE) > 300
    assert has_colour(both, ORANGE) > 300
    assert has_colour(one, ORANGE) == 0 < has_colour(one, BLUE)
    assert has_colour(other, BLUE) == 0 < has_colour(other, ORANGE)


def test_histogram_bars_are_as_high_as_their_shares(tmp_path):
    """Of bars of 80 % and 20 %, the outline of the first reaches four times as high."""
    distance_histogram(evaluation(held_out=None), tmp_path / "x.png")
    picture = read(tmp_path / "x.png")
    blue = (picture == [0x00, 0x72, 0xB2]).all(-1)
    blue[:260] = False  # the key
    lefts = blue.any(0).nonzero()[0]
    quarter = (lefts.max() - lefts.min()) / 4
    bottom = blue.any(1).nonzero()[0].max()
    heights = []
    for bar in (0, 3):
        middle = int(lefts.min() + (bar + 0.5) * quarter)
        heights.append(bottom - blue[:, middle].nonzero()[0].min())
    assert heights[0] / heights[1] == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 0.0])
def test_errors_of_any_size_can_be_drawn(tmp_path, scale):
    """Exactly no error has no logarithm."""
    error_over_time(evaluation(error=velocity_error(scale)), tmp_path / "x.png")
    assert has_colour(read(tmp_path / "x.png"), BLUE) > 300


@pytest.mark.parametrize("values", [(0.1, 0.2, 0.3), (1e-3, 1e-1, 1e1)])
def test_wide_errors_get_a_logarithmic_axis_and_narrow_ones_do_not(tmp_path, values):
    """Either way the middle value stands half way up, as on no axis of the other kind."""
    error = dataclasses.replace(velocity_error(1.0), times=(0.0, 0.5, 1.0), mean_squared=values)
    error_over_time(evaluation(error=error, held_out_error=None), tmp_path / "x.png")
    blue = (read(tmp_path / "x.png") == [0x00, 0x72, 0xB2]).all(-1)
    blue[:210] = False  # the key
    left, right = blue[:, 140:870].any(0).nonzero()[0][[0, -1]] + 140  # the left panel
    heights = [blue[:, x].nonzero()[0].mean() for x in (left + 4, (left + right) // 2, right - 4)]
    assert heights[0] > heights[2] + 300
    assert (heights[0] - heights[1]) / (heights[0] - heights[2]) == pytest.approx(0.5, abs=0.03)


def test_nothing_to_draw_is_refused(tmp_path):
    bare = evaluation(samples=None, held_out=None, error=None, held_out_error=None)
    with pytest.raises(InputError, match="no distances"):
        distance_histogram(bare, tmp_path / "x.png")
    with pytest.raises(InputError, match="no error"):
        error_over_time(bare, tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


# ----- files


def pictures(folder):
    """One of each kind."""
    folder.mkdir()
    sample_grid(random_images(3, (1, 8, 8))[1], folder / "a.png", columns=2, captions=list("abc"))
    comparison([column("u*", (3, 32, 32), 2)], folder / "b.png", seeds=[0, 1], n=5)
    distance_histogram(evaluation(), folder / "c.png")
    error_over_time(evaluation(), folder / "d.png")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_same_result_gives_the_same_bytes(tmp_path):
    first, second = pictures(tmp_path / "first"), pictures(tmp_path / "second")
    assert first == second
    assert len(first) == 4
    for data in first.values():
        with Image.open(io.BytesIO(data)) as image:
            assert image.info == {}  # no date, no version, no resolution


def test_matplotlib_is_imported_late_without_pyplot_and_left_as_it_was(tmp_path):
    """In a process of its own: other tests may import pyplot."""
    program = """if True:
        import sys
        import torch
        from nnflow.plots import sample_grid
        assert "matplotlib" not in sys.modules
        import matplotlib
        names = [name for name in matplotlib.rcParams if name != "backend"]  # asking loads pyplot
        before = [matplotlib.rcParams[name] for name in names]
        sample_grid(torch.zeros(1, 1, 8, 8), sys.argv[1], columns=1, captions=["$"])
        assert [matplotlib.rcParams[name] for name in names] == before
        assert "matplotlib.pyplot" not in sys.modules
        """
    command = [sys.executable, "-W", "error", "-c", program, str(tmp_path / "x.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.png").is_file()


def test_folders_are_made_and_files_replaced_whole(tmp_path):
    path = tmp_path / "deep" / "er" / "x.png"
    _, images = random_images(1, (1, 8, 8))
    for _ in range(2):
        sample_grid(images, path, columns=1)
    assert [p.name for p in path.parent.iterdir()] == ["x.png"]


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="choose another path"):
        sample_grid(random_images(1, (1, 8, 8))[1], tmp_path / "file" / "x.png", columns=1)


# ----- bad input


@pytest.mark.parametrize(
    ("images", "columns", "captions", "said"),
    [
        (torch.zeros(0, 1, 8, 8), 1, None, "no images"),
        (torch.zeros(2, 8, 8), 1, None, r"\(2, 8, 8\)"),
        (torch.zeros(2, 4, 8, 8), 1, None, "C = 1"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), 1, None, "uint8"),
        (torch.full((2, 1, 8, 8), torch.nan), 1, None, "NaN"),
        (torch.zeros(2, 1, 8, 8), 0, None, "0 columns"),
        (torch.zeros(2, 1, 8, 8), 1, ["a"], "1 captions for 2 images"),
    ],
)
def test_wrong_images_are_refused(tmp_path, images, columns, captions, said):
    with pytest.raises(InputError, match=said):
        sample_grid(images, tmp_path / "x.png", columns=columns, captions=captions)
    assert list(tmp_path.iterdir()) == []


def test_columns_that_do_not_match_are_refused(tmp_path):
    good = column("u*", (1, 8, 8))
    for columns, seeds, said in (
        ([], [1], "nothing to compare"),
        ([good], [], "nothing to compare"),
        ([good], [1, 2], "3 distances.*2 seeds"),
        ([good, column("other", (1, 4, 4))], [1, 2, 3], "'other' holds"),
    ):
        with pytest.raises(InputError, match=said):
            comparison(columns, tmp_path / "x.png", seeds=seeds, n=9)
