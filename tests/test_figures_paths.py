"""Cosines over time and over dimension, against closed forms by hand and slow obvious computations."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from contract import pixels_of
from oracles import velocity_from_score
from PIL import Image
from refusals import refused
from stores import store_of

from nnflow.embedding import collapse_time
from nnflow.errors import InputError
from nnflow.evaluation import draw_pairs
from nnflow.figures.alignment import (
    Paths,
    along_paths,
    crossed,
    first_lasting,
    measure_paths,
    summary,
    times_of,
)
from nnflow.figures.cosines import CosineSettings
from nnflow.figures.cosines import measure as measure_cosines
from nnflow.figures.dimension import EXPERIMENT as DIMENSION
from nnflow.figures.dimension import DimensionSettings
from nnflow.figures.inputs import Inputs
from nnflow.figures.parts import Parts
from nnflow.figures.points import store_of_points
from nnflow.figures.sizes import originals_of_source, originals_of_store, smaller
from nnflow.figures.spectra import spectrum_of, spectrum_of_few
from nnflow.fitting import fit_embedding
from nnflow.memory import DEFAULT_BUDGET
from nnflow.store import ImageStore, to_float
from nnflow.velocity import EmpiricalVelocity

TIMES = (0.0, 0.1, 0.35, 0.6, 0.9)


def cosine(a: list[float], b: list[float]) -> float:
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.hypot(*a) / math.hypot(*b)


def test_two_points_by_hand() -> None:
    """Of -a and a the mean is a tanh(t x.a / (1-t)^2), one weight a logistic function of twice that."""
    a = [0.6, -0.2]
    store = store_of_points(torch.tensor([a, [-v for v in a]]))
    a = to_float(store.pixels)[0].tolist()  # on the grid of pixels: exactly opposite
    field = EmpiricalVelocity.exact(store)
    x0 = torch.tensor([[0.3, 1.1], [-0.5, -0.4], [2.0, 0.1]]).reshape(3, 1, 1, 2)
    x1 = store.images(torch.tensor([0, 1, 1]))
    found = along_paths(field, x0, x1, TIMES)
    for row in range(3):
        start, end = x0[row].flatten().tolist(), x1[row].flatten().tolist()
        for column, t in enumerate(TIMES):
            x = [(1 - t) * s + t * e for s, e in zip(start, end, strict=True)]
            tilt = t * math.fsum(v * w for v, w in zip(x, a, strict=True)) / (1 - t) ** 2
            velocity = [(v * math.tanh(tilt) - w) / (1 - t) for v, w in zip(a, x, strict=True)]
            wanted = cosine(velocity, [e - s for s, e in zip(start, end, strict=True)])
            assert found.cosines[row, column].item() == pytest.approx(wanted, abs=2e-6)
            weight = 1 / (1 + math.exp(-2 * tilt))
            ess = 1 / (weight**2 + (1 - weight) ** 2)
            assert found.ess[row, column].item() == pytest.approx(ess, rel=1e-5)


def test_what_has_settled_is_what_the_field_says(tmp_path: Path) -> None:
    """Pairs that are not asked any more, against the velocity of the mixture's score at every time."""
    pixels = pixels_of(12)
    pixels[1] = pixels[0]
    pixels[1, 0, 0, 0] ^= 1  # a near-copy: its pair settles late or not at all
    store = store_of(pixels, tmp_path)
    field, times = EmpiricalVelocity.exact(store), times_of(20)[1:]
    x0, x1, ids = draw_pairs(store, 40, seed=3, rows=slice(0, 40))
    assert (ids <= 1).any()
    found = along_paths(field, x0, x1, times)
    asked = []
    inner = field.estimate
    field.estimate = lambda x, t: asked.append(len(x)) or inner(x, t)  # type: ignore[method-assign, assignment]
    along_paths(field, x0, x1, times)
    assert asked[0] == 40 > asked[-1] > 0  # most settle, the near-copies do not
    images = store.images(torch.arange(12)).flatten(1)
    for column, t in enumerate(times):
        x = ((1 - t) * x0 + t * x1).flatten(1)
        velocity = velocity_from_score(images, x, torch.full((40,), t))
        target = (x1 - x0).flatten(1).double()
        wanted = torch.nn.functional.cosine_similarity(velocity, target, dim=1)
        torch.testing.assert_close(found.cosines[:, column], wanted, rtol=0, atol=3e-6)


def test_mass_on_another_image_is_not_settled(tmp_path: Path) -> None:
    """A path that crosses another image's: all of the mass is on that one, for a while."""
    store = store_of(pixels_of(4), tmp_path)
    field, images = EmpiricalVelocity.exact(store), store.images(torch.arange(4))
    x1, other = images[:1], images[1:2]
    x0 = 4 * (other - x1)  # at t = .8 the path is at .8 times the other image
    times = (0.8, 0.82, 0.95)
    found = along_paths(field, x0, x1, times)
    for column, t in enumerate(times):
        x = ((1 - t) * x0 + t * x1).flatten(1)
        velocity = velocity_from_score(images.flatten(1), x, torch.tensor([t]))
        wanted = torch.nn.functional.cosine_similarity(velocity, (x1 - x0).flatten(1).double(), dim=1)
        assert found.cosines[0, column].item() == pytest.approx(wanted.item(), abs=3e-6)
    assert found.ess[0].tolist() == pytest.approx([1, 1, 1], abs=1e-3)
    assert found.cosines[0, 1] < 0.99 < found.cosines[0, 2]


def test_pairs_do_not_depend_on_the_blocks(tmp_path: Path) -> None:
    store = store_of(pixels_of(9), tmp_path)
    x0, x1, ids = draw_pairs(store, 7, seed=5, rows=slice(0, 7))
    for row in range(7):
        some = draw_pairs(store, 7, seed=5, rows=slice(row, row + 1))
        assert torch.equal(some[0][0], x0[row])
        assert torch.equal(some[1][0], x1[row])
        assert some[2].item() == ids[row]
        assert torch.equal(x1[row], store.images(ids[row : row + 1])[0])
    assert not torch.equal(draw_pairs(store, 7, seed=6, rows=slice(0, 7))[0], x0)


def test_the_summary_counts_what_is_there() -> None:
    cosines = torch.tensor(
        [[-1.0, 0.95, 1.0], [0.5, 0.91, 1.0], [0.95, 0.9, 1.0 + 2e-16], [-0.19, 0.99, 0.97]]
    )
    ess = torch.tensor([[4.0, 3.0, 1.0], [4.0, 1.5, 1.0], [4.0, 1.5, 1.0], [4.0, 1.5, 1.2]])
    paths = Paths(cosines.double(), ess.double())
    found = summary(paths, (0.0, 0.1, 0.2), name="x", shape=(9, 3, 2, 2))
    assert found.share == (0.25, 0.75, 1.0)
    assert [sum(column) for column in found.counts] == [4, 4, 4]
    where = [[i for i, n in enumerate(column) for _ in range(n)] for column in found.counts]
    assert where == [[0, 20, 37, 48], [47, 47, 48, 49], [49, 49, 49, 49]]  # bins of .04 from -1 on
    assert found.aligned_from == 0.2
    assert found.collapsed_from == 0.1
    assert found.ess == (4.0, 1.5, 1.0)
    assert found.low[0] < 0.25 < found.high[0]
    assert found.rise == pytest.approx((0.1 + 0.1 * 0.2 / 0.25) - 0.1 * 0.45 / 0.5)


def test_lasting_and_crossing() -> None:
    times = (0.0, 0.1, 0.2, 0.3)
    assert first_lasting([True, False, True, True], times) == 0.2
    assert first_lasting([True] * 4, times) == 0.0
    assert first_lasting([True, True, True, False], times) is None
    assert crossed((0.9, 0.2, 0.4, 1.0), times, 0.7) == pytest.approx(0.25)
    assert crossed((0.9, 0.8, 0.9, 1.0), times, 0.7) == 0.0
    assert crossed((0.1, 0.2, 0.3, 0.4), times, 0.7) is None


def test_cosines_take_the_field_asked_for(tmp_path: Path) -> None:
    """Images of the index and the plane beside each other; a tolerance needs an index, which is not there."""
    store_of(pixels_of(11), tmp_path)
    inputs = Inputs(out=tmp_path / "o", index=tmp_path / "out")
    settings = CosineSettings(pairs=5, times=3, point_count=6, points="three points")
    found = measure_cosines(settings, inputs, Parts(tmp_path / "parts", {}))
    assert found.plane.shape == (3, 1, 1, 2)
    assert found.images.shape == (11, 3, 4, 4)
    direct = measure_paths(
        inputs.field(), times=times_of(3), pairs=5, seed=0, parts=Parts(tmp_path / "p", {}), key={}, name="x"
    )
    assert found.images.median == tuple(direct.cosines.quantile(0.5, 0).tolist())
    near = Inputs(out=tmp_path / "o", index=tmp_path / "out", tolerance=0.01)
    with pytest.raises(Exception, match="nnflow index"):
        measure_cosines(settings, near, Parts(tmp_path / "parts", {}))


# ---------------------------------------------------------------------- sizes and spectra


@pytest.mark.parametrize("channels", [1, 3])
def test_smaller_images_are_those_of_pillow(tmp_path: Path, channels: int) -> None:
    pixels = torch.randint(
        0, 256, (5, channels, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    store = store_of(pixels, tmp_path)
    small = smaller(store, 4, tmp_path / "small")
    assert small.shape == (5, channels, 4, 4)
    for row, image in enumerate(small.pixels.reshape(5, channels, 4, 4)):
        for plane in range(channels):
            whole = Image.fromarray(store.pixels[row].reshape(channels, 12, 12)[plane].numpy())
            wanted = np.asarray(whole.resize((4, 4), Image.Resampling.LANCZOS))
            assert np.array_equal(image[plane].numpy(), wanted)
    before = (tmp_path / "small" / "pixels.bin").stat().st_mtime_ns
    assert torch.equal(smaller(store, 4, tmp_path / "small").pixels, small.pixels)
    assert (tmp_path / "small" / "pixels.bin").stat().st_mtime_ns == before
    assert small.fingerprint != store.fingerprint


def test_images_are_never_enlarged(tmp_path: Path) -> None:
    store = store_of(pixels_of(3), tmp_path)
    stored = originals_of_store(store)
    assert stored.too_large(4) is None
    assert "wanted sizes up to 4" in str(stored.too_large(8))
    assert stored.at(4, Parts(tmp_path / "p", {})) is store
    Image.new("RGB", (9, 7)).save(tmp_path / "source" / "00001.png")  # the shorter side counts
    found = originals_of_source(tmp_path / "source", Parts(tmp_path / "q", {}), limit=None, seed=0)
    assert (found.smallest, found.count) == (4, 3)
    for name in ("00000.png", "00002.png"):
        Image.new("RGB", (30, 20)).save(tmp_path / "source" / name)
    found = originals_of_source(tmp_path / "source", Parts(tmp_path / "q", {}), limit=None, seed=0)
    assert (found.smallest, found.example) == (7, "00001.png")
    assert "00001.png is 7 pixels" in str(found.too_large(8))


def test_the_spectrum_of_few_images_is_that_of_their_covariance(tmp_path: Path) -> None:
    store = store_of(pixels_of(13), tmp_path)  # 48 values
    values = to_float(store.pixels).double().numpy()
    wanted = np.linalg.eigvalsh(np.cov(values.T, bias=True))[::-1]
    few = spectrum_of_few(store)
    assert few.shape == (48,)
    np.testing.assert_allclose(few.numpy()[:12], wanted[:12], rtol=1e-5)
    assert few[13:].abs().max() == 0
    np.testing.assert_allclose(spectrum_of(store, budget=DEFAULT_BUDGET).numpy()[:12], wanted[:12], rtol=1e-4)
    embedding = fit_embedding(store, rank=1, budget=DEFAULT_BUDGET)
    assert collapse_time(few.float(), 13) == pytest.approx(collapse_time(embedding.spectrum, 13), abs=1e-4)


# ---------------------------------------------------------------------- dimension


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten smooth pictures of 24 x 20."""
    folder, draw = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for number in range(10):
        coarse = Image.fromarray(draw.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize((24, 20), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def test_sizes_that_fit_are_measured_and_the_others_named(photos: Path, tmp_path: Path) -> None:
    settings = DimensionSettings(sizes=(4, 16, 8, 32), pairs=20, times=25)
    document = DIMENSION.run(settings, Inputs(out=tmp_path / "o", source=photos), command="nnflow figures x")
    found = document.results["sizes"]
    assert [size["size"] for size in found] == [4, 8, 16]
    assert [size["shape"] for size in found] == [[10, 3, s, s] for s in (4, 8, 16)]
    assert document.missing == (
        "size 32: 0.png is 20 pixels on the shorter side, and images are not enlarged; wanted sizes up to 20",
    )
    starts = [size["aligned_from"] for size in found]
    assert starts == sorted(starts, reverse=True)
    assert starts[0] > starts[-1]
    assert [size["predicted"] for size in found] == sorted((s["predicted"] for s in found), reverse=True)
    for size in found:  # 25 times: a grid of .04, and a rule of thumb for Gaussians
        assert size["collapsed_from"] == pytest.approx(size["predicted"], abs=0.15)
    store = ImageStore.build(photos, tmp_path / "direct", size=8)
    paths = measure_paths(
        EmpiricalVelocity.exact(store), times=times_of(25), pairs=20, seed=0,
        parts=Parts(tmp_path / "p", {}), key={}, name="x",
    )  # fmt: skip
    assert found[1]["median"] == paths.cosines.quantile(0.5, 0).tolist()
    assert document.provenance["field"] == "exact"
    drawn = DIMENSION.draw(document, tmp_path / "o")
    assert [path.name for path in drawn] == ["dimension.png", "dimension.pdf"]
    caption = DIMENSION.caption(document)
    assert "n = 10 images resized by LANCZOS from the originals" in caption
    assert caption.endswith("Made by: nnflow figures x")


def test_sizes_of_a_store_come_from_its_images(tmp_path: Path) -> None:
    pixels = torch.randint(
        0, 256, (6, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    store_of(pixels, tmp_path)
    inputs = Inputs(out=tmp_path / "o", index=tmp_path / "out")
    document = DIMENSION.run(DimensionSettings(pairs=4, times=3), inputs)
    assert [size["size"] for size in document.results["sizes"]] == [8, 16]  # as far as the images allow
    assert document.missing == ()
    assert "from the stored images of 16" in document.results["resampling"]
    with refused(InputError, "wanted sizes up to 16"):
        DIMENSION.run(DimensionSettings(sizes=(32,)), inputs)
    with refused(InputError, "--limit is of --source"):
        DIMENSION.run(DimensionSettings(limit=3), inputs)
    assert json.loads((tmp_path / "o" / "dimension.json").read_text())["results"] == document.results
