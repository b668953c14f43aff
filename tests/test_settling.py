"""Settling times against distances of pixels, the mean itself, and paper and pencil, in float64."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from contract import all_images, pixels_of
from stores import store_of
from torch import Tensor

from nnflow import settling
from nnflow.errors import DegradedWarning, InputError, StoreError
from nnflow.index import NeighbourIndex
from nnflow.memory import parse_bytes
from nnflow.settling import SETTLING, read_settling, settling_times, write_settling

RISK, TOLERANCE = 0.03, 0.02


def index_of(pixels: Tensor, folder: Path) -> NeighbourIndex:
    store = store_of(pixels, folder)
    return NeighbourIndex.build(store, store.folder, rank=4)


def times_of(pixels: Tensor, folder: Path, *, risk: float = RISK, tolerance: float = TOLERANCE) -> Tensor:
    found = settling_times(index_of(pixels, folder), risk=risk, tolerance=tolerance)
    assert found is not None
    return found.double()


def photos(count: int, seed: int = 0) -> Tensor:
    """Images of 8 x 8 whose distances vary, as those of photos do."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 3, 3, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, 8, mode="bilinear")
    contrast = torch.rand(count, 1, 1, 1, generator=generator) + 0.3
    return (128 + 60 * contrast * smooth).clamp(0, 255).to(torch.uint8)


def others_of(images: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Distances in pixels from each image to all images, then to their mirror images; inf for copies."""
    mirrored = images.view(-1, *shape).flip(-1).flatten(1)
    both = torch.cat([images, mirrored])
    distances = (images[:, None] - both).norm(dim=2)
    return distances.masked_fill(distances == 0, torch.inf)


def share_moved(images: Tensor, own: int, t: float, *, draws: int = 1500) -> float:
    """How often, over the noise, the mean of all images lies further from the own one than tolerated."""
    generator = torch.Generator().manual_seed(own)
    noise = torch.randn(draws, images.shape[1], generator=generator, dtype=torch.float64)
    x = t * images[own] + (1 - t) * noise
    weights = (-torch.cdist(x, t * images).square() / (2 * (1 - t) ** 2)).softmax(1)
    moved = (weights @ images - images[own]).norm(dim=1) / (1 - t)
    return (moved > TOLERANCE * images.shape[1] ** 0.5).double().mean().item()


@pytest.mark.parametrize("flip", [False, True])
def test_pairs_that_have_settled_go_straight(tmp_path: Path, flip: bool) -> None:
    """The share of pairs that still move is within the risk at every later time, and well above earlier."""
    index = index_of(photos(60), tmp_path)
    times = settling_times(index, risk=RISK, tolerance=TOLERANCE)
    assert times is not None
    images = all_images(index.store)
    if flip:
        images = torch.cat([images, images.view(-1, 3, 8, 8).flip(-1).flatten(1)])
    before = []
    for own in range(0, 60, 5):
        time = times[own].item()
        for later in (0.0, 0.1, 0.5):
            share = share_moved(images, own, time + later * (1 - time))
            assert share <= RISK + 3 * math.sqrt(RISK / 1500)
        odds = 0.6 * time / (1 - time)
        before.append(share_moved(images, own, odds / (1 + odds)))
    assert sum(before) / len(before) > 2 * RISK, "settling times are far too late: they would pass above"


def bound(distances: Tensor, t: Tensor, dim: int) -> Tensor:
    """Eq. 18 of docs/field.md, term by term."""
    sigma = (t / (1 - t))[:, None] * distances
    eta = TOLERANCE * dim**0.5 * (1 - t)[:, None]
    terms = (distances / eta).sqrt() * 4 / (math.sqrt(2 * math.pi) * sigma) * torch.exp(-sigma.square() / 8)
    return terms.nan_to_num(0.0).sum(1)


@pytest.mark.parametrize("kind", ["photos", "noise", "two clusters", "no far ones", "twins", "few"])
def test_times_are_those_of_the_pixels_distances_or_later(tmp_path: Path, kind: str) -> None:
    """Rounding, projecting and interpolating may delay a time a little, never advance it."""
    generator = torch.Generator().manual_seed(1)
    shape = (200, 3, 8, 8)  # more images than pixels: the coordinates hold all but rounding
    if kind == "noise":
        pixels = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
    elif kind == "two clusters":  # far apart, each a fifth as wide: where rounding of coordinates tells
        base = 40 + 150 * (torch.arange(200) % 2).view(-1, 1, 1, 1)
        pixels = (base + torch.randint(-17, 18, shape, generator=generator)).to(torch.uint8)
    elif kind == "no far ones":
        pixels = (128 + torch.randint(-4, 5, shape, generator=generator)).to(torch.uint8)
    else:
        pixels = photos(80 if kind == "few" else 200)
    if kind == "twins":  # too close for two digits: images of length 11, .25 to 1 apart
        pixels[:6] = torch.randint(0, 2, (6, 3, 8, 8), generator=generator) * 200 + 10
        pixels[1], pixels[3], pixels[5] = pixels[0], pixels[2].flip(-1), pixels[4]
        for twin, bit in ((1, 32), (3, 64), (5, 128)):
            pixels[twin, 0, 2, 2] ^= bit
    index = index_of(pixels, tmp_path)
    times = settling_times(index, risk=RISK, tolerance=TOLERANCE)
    assert times is not None
    exact = others_of(all_images(index.store), (3, 8, 8))
    assert (bound(exact, times.double(), 192) <= RISK).all()
    if kind != "few":  # mirror images are not in the span of few images
        odds = 0.94 * times.double() / (1 - times.double())
        assert (bound(exact, odds / (1 + odds), 192) > RISK).all()


def test_sums_are_bounded_at_every_scale(tmp_path: Path) -> None:
    """What stands for log L(c) is never below it, and above it by little where settling is decided."""
    pixels = photos(200)
    pixels[1] = pixels[0]
    pixels[1, 0, 2, 2] ^= 8
    index = index_of(pixels, tmp_path)
    others = settling._Crowd(index, 4.0, 200).others(0, 40)
    squares = others_of(all_images(index.store), (3, 8, 8))[:40].square()
    nearest = torch.minimum(others.nearest, others.close.amin(1)).square()
    assert (nearest <= squares.amin(1) * (1 + 1e-6)).all()  # pixels are rounded to float32 there
    for fall in (0.5, 2.0, 3.9, 4.5, 6.0, 9.0, 20.0, 100.0):
        c = fall / nearest
        wanted = (-c[:, None] * squares).logsumexp(1)
        found = others.log_sum(c)
        assert (found >= wanted - 1e-5 * fall).all()
        if 4.5 <= fall <= 9:
            assert (found < wanted + 0.1 * fall).all()


def test_two_images_by_hand(tmp_path: Path) -> None:
    """Two grey cards: the mean moves by more than eta when the logit gap is below log(d / eta - 1)."""
    pixels = torch.tensor([100, 130], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    times = times_of(pixels, tmp_path)
    distance = 8 * 30 / 127.5
    assert times[0] == times[1]

    def risk_at(t: float) -> float:
        sigma, eta = t / (1 - t) * distance, TOLERANCE * 8 * (1 - t)
        return 0.5 * math.erfc((sigma / 2 - math.log(distance / eta - 1) / sigma) / math.sqrt(2))

    t = times[0].item()
    odds = 0.8 * t / (1 - t)
    assert risk_at(t) <= RISK < risk_at(odds / (1 + odds))


def test_near_duplicates_settle_late(tmp_path: Path) -> None:
    """One bit, one grey level in one pixel, a mirrored copy less one bit: nothing of these may be missed."""
    pixels = pixels_of(30)
    times = times_of(pixels, tmp_path / "plain")
    twins = pixels[[3, 4, 5, 6, 7]].clone()
    twins[0, 1, 2, 2] ^= 1
    twins[1, 0, 1, 3] ^= 4
    twins[2] = twins[2].flip(-1)
    twins[2, 2, 0, 0] ^= 1
    twins[3] = twins[3].flip(-1)  # a copy for fields with mirror images, harmless to others
    # and twins[4] is a copy
    found = times_of(torch.cat([pixels, twins]), tmp_path / "twins")
    for own, twin, bits in ((3, 30, 1), (4, 31, 4), (5, 32, 1)):
        assert found[own] == found[twin]
        # resolved when t d / (1-t) is a few: d is bits / 127.5
        assert 2 < found[own] / (1 - found[own]) * bits / 127.5 < 12
    assert found[[3, 4, 5]].min() > 0.97
    rest = [own for own in range(30) if own not in (3, 4, 5)]
    assert (found[rest] >= times[rest] - 1e-6).all()
    assert (found[rest] < times[rest] + 0.05).all()
    assert times.max() < 0.8


def test_an_image_and_its_own_mirror_image(tmp_path: Path) -> None:
    """Alone, a symmetric image has settled from the start; one that is not, when its mirror image is gone."""
    generator = torch.Generator().manual_seed(3)
    crooked = torch.randint(0, 256, (1, 1, 8, 8), generator=generator).to(torch.uint8)
    even = torch.cat([crooked[..., :4], crooked[..., :4].flip(-1)], 3)
    assert times_of(even, tmp_path / "even")[0] < 0.3
    nearly = even.clone()
    nearly[..., 2, 2] ^= 1
    assert times_of(nearly, tmp_path / "nearly")[0] > 0.99
    assert 0.3 < times_of(crooked, tmp_path / "crooked")[0] < 0.9


def test_crowds_never_settle(tmp_path: Path) -> None:
    """Of 40 images one bit apart no distances are kept; those of 20 others are."""
    pixels = photos(61)
    pixels[20:60] = pixels[60]
    for number in range(40):
        pixels[20 + number].view(-1)[4 * number] ^= 1
    times = times_of(pixels, tmp_path)
    assert (times[20:] == 1).all()
    assert (times[:20] < 1).all()


@pytest.mark.parametrize("grey", [77, 255])  # 255 is 1.0: coordinates of exactly 0
def test_images_all_alike_have_settled(tmp_path: Path, grey: int) -> None:
    """Copies are one image, and grey cards are their own mirror images."""
    assert (times_of(torch.full((5, 1, 8, 8), grey, dtype=torch.uint8), tmp_path) < 0.3).all()


def test_more_images_only_delay(tmp_path: Path) -> None:
    pixels = photos(70)
    few, many = times_of(pixels[:30], tmp_path / "few"), times_of(pixels, tmp_path / "many")
    assert (many[:30] > few - 0.01).all()  # other coordinates, other rounding
    assert (many[:30] > few + 0.005).any()


def test_a_smaller_risk_or_tolerance_is_later(tmp_path: Path) -> None:
    index = index_of(photos(30), tmp_path)
    usual = settling_times(index)
    safer, closer = settling_times(index, risk=1e-4), settling_times(index, tolerance=1e-3)
    assert usual is not None
    assert safer is not None
    assert closer is not None
    assert (safer > usual).all()
    assert (closer > usual).all()


def test_blocks_and_the_kind_of_product_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = photos(50)
    pixels[30] = pixels[20]
    pixels[30, 0, 0, 0] ^= 1
    index = index_of(pixels, tmp_path)
    whole = settling_times(index)
    assert whole is not None
    for memory in ("50KiB", "200KiB"):
        found = settling_times(index, memory=parse_bytes(memory))
        assert found is not None
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=0)
    monkeypatch.setattr("nnflow.integers.are_fast", lambda: False)
    monkeypatch.setattr(settling, "_TILE", 7)
    wide = settling_times(index)
    assert wide is not None
    torch.testing.assert_close(wide, whole, rtol=1e-4, atol=0)


def test_what_would_take_too_long_is_left(tmp_path: Path) -> None:
    index = index_of(photos(10), tmp_path)
    with pytest.warns(DegradedWarning, match="10 images would take .* more than 0 s"):
        assert settling_times(index, seconds=0.0, memory=parse_bytes("10KiB")) is None


def test_what_would_take_far_too_long_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Coordinates of all images alone can take minutes: told from those of the first few."""
    seen = []

    class Seen(settling._Crowd):
        def __init__(self, index: NeighbourIndex, fall: float, count: int) -> None:
            seen.append(count)
            super().__init__(index, fall, count)

    monkeypatch.setattr(settling, "_Crowd", Seen)
    monkeypatch.setattr(settling, "_TILE", 4)
    index = index_of(photos(30), tmp_path)
    with pytest.warns(DegradedWarning, match="30 images would take"):
        assert settling_times(index, seconds=1e-9) is None
    assert seen == [4]
    assert settling_times(index, seconds=600.0) is not None
    assert seen == [4, 4, 30]


def test_wrong_arguments_are_said(tmp_path: Path) -> None:
    index = index_of(photos(3), tmp_path)
    for risk, tolerance in (
        (0.0, 0.01),
        (1.0, 0.01),
        (0.01, 0.0),
        (float("nan"), 0.01),
        (0.01, float("nan")),
    ):
        with pytest.raises(InputError, match="risk"):
            settling_times(index, risk=risk, tolerance=tolerance)
    with pytest.raises(InputError, match="too small"):
        settling_times(index, memory=100)


def test_kept_and_read_again(tmp_path: Path) -> None:
    store = index_of(photos(12), tmp_path / "a").store
    assert read_settling(store) is None
    times = torch.linspace(0.1, 1, 12)
    write_settling(store, times)
    found = read_settling(store)
    assert found is not None
    assert torch.equal(found, times)
    path = store.folder / SETTLING
    assert sorted(file.name for file in store.folder.glob("settling*")) == [SETTLING]

    other = index_of(photos(12, seed=1), tmp_path / "b").store
    (other.folder / SETTLING).write_bytes(path.read_bytes())
    with pytest.raises(StoreError, match="other images"):
        read_settling(other)


def test_a_damaged_file_is_said(tmp_path: Path) -> None:
    store = index_of(photos(12), tmp_path).store
    path = store.folder / SETTLING
    write_settling(store, torch.linspace(0.1, 1, 12))
    good = path.read_bytes()
    for damaged in (good[:-40], good[: len(good) // 2], b"", b"PK\x03\x04", b"\x93NUMPY"):
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match=r"not readable .*nnflow calibrate"):
            read_settling(store)
    for values, match in (
        ({"format": "nnflow-settling-0"}, "wanted nnflow-settling-1"),
        ({"times": np.zeros(11, np.float32)}, "other images"),
        ({"times": np.zeros(12)}, "other images"),
        ({"times": np.array([None])}, "not readable"),
    ):
        held = {"format": "nnflow-settling-1", "store": store.fingerprint, "times": np.zeros(12, np.float32)}
        np.savez(path, **(held | values))
        with pytest.raises(StoreError, match=match):
            read_settling(store)
