"""Candidates weighed a few at a time, whatever the order they come in, against the sum itself in float64."""

import pytest
import torch
from torch import Tensor

from nnflow import nearfield
from nnflow.codec import to_uint8
from nnflow.nearfield import weigh
from nnflow.path import interpolate
from nnflow.pixels import PixelRows

D, ROW = 48, 4 * 48  # values, and bytes in float32, of one image


@pytest.fixture(scope="module")
def rows() -> PixelRows:
    generator = torch.Generator().manual_seed(0)
    near = torch.randn(1, D, generator=generator) + 0.3 * torch.randn(60, D, generator=generator)
    return PixelRows(to_uint8(0.4 * near))


def logits_of(rows: PixelRows, x: Tensor, t: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of eq. 3, and the images, float64."""
    images = rows.pixels[ids.clamp_min(0)].double() / 127.5 - 1
    apart = (x.double()[:, None] - t.double()[:, None, None] * images).square().sum(2)
    logits = -0.5 * apart / (1 - t.double()[:, None]).square()
    return logits.masked_fill(ids < 0, -torch.inf), images


@pytest.mark.parametrize("heaviest", ["first", "last", "anywhere"])
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("room", [1, 5, 23, 24, 50, 1000])  # images that the budget holds at once
@pytest.mark.parametrize("time", [0.05, 0.2, 0.35, 0.7, 0.95])
def test_candidates_are_weighed_a_few_at_a_time(
    rows: PixelRows, time: float, room: int, norms: bool, heaviest: str
) -> None:
    generator = torch.Generator().manual_seed(round(100 * time))
    ids = torch.stack([torch.randperm(rows.count, generator=generator)[:23] for _ in range(4)])
    x1 = rows.values(ids[:, 7])
    x = interpolate(torch.randn(4, D, generator=generator), x1, time)
    t = torch.full((4,), time)
    if heaviest != "anywhere":
        order = logits_of(rows, x, t, ids)[0].argsort(dim=1, descending=heaviest == "first")
        ids = ids.gather(1, order)
    ids[1, -6:] = -1
    logits, images = logits_of(rows, x, t, ids)
    squares = rows.squared_norms(1 << 20).float() if norms else None
    near = weigh(rows, ids, x, t, budget=room * ROW, norms=squares)
    torch.testing.assert_close(near.weighted.log_mass, logits.logsumexp(1), rtol=0, atol=1e-3)
    assert torch.equal(near.anchor, logits.argmax(1))
    mean = (logits.softmax(1)[:, :, None] * images).sum(1)
    torch.testing.assert_close(near.mean.double(), mean, rtol=0, atol=2e-5)


@pytest.mark.parametrize("time", [0.99, 0.9999, 0.99999])
def test_one_far_heavier_than_what_the_expansion_took_for_the_heaviest(time: float) -> None:
    """Copies that differ by one grey level: the expansion errs by more than exp holds in float32."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randint(120, 130, (1, 3072), generator=generator, dtype=torch.uint8)
    pixels = base.repeat(40, 1)
    pixels[torch.arange(40), torch.arange(40)] += 1
    rows = PixelRows(pixels)
    own = torch.randint(40, (64,), generator=generator)
    x = time * rows.values(own)
    ids, t = torch.arange(40).expand(64, -1), torch.full((64,), time)
    near = weigh(rows, ids, x, t, budget=1 << 20)
    assert float(near.logits.max()) > (88 if time > 0.9999 else -1)
    logits, images = logits_of(rows, x, t, ids)
    mean = (logits.softmax(1)[:, :, None] * images).sum(1)
    torch.testing.assert_close(near.mean.double(), mean, rtol=0, atol=1e-5)


@pytest.mark.parametrize("time", [0.1, 0.9])
def test_no_queries_have_no_means(rows: PixelRows, time: float) -> None:
    ids = torch.zeros(0, 5, dtype=torch.int64)
    assert weigh(rows, ids, torch.zeros(0, D), torch.full((0,), time), budget=1 << 20).mean.shape == (0, D)


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize(("queries", "k"), [(0, 5), (1, 500), (7, 1), (9, 130), (20, 33), (20, 700)])
def test_images_come_a_few_at_a_time_in_whole_turns(
    threads: int, queries: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each once, within the budget, and of a multiple of as many queries as threads but for the last."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    rows = PixelRows(torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, 6).contiguous())
    ids = torch.randint(0, 256, (queries, k), generator=torch.Generator().manual_seed(k))
    for budget in (10, 24 * 100, 24 * 3000, 1 << 30):
        monkeypatch.setattr(nearfield, "_CACHE_BYTES", 24 * 64)
        found, firsts = torch.full((queries, k), -1.0), []
        for here, some, images in nearfield._gathered(rows, ids, budget):
            assert found[here, some].eq(-1).all()
            found[here, some] = images[:, :, 0]
            firsts.append(here.start)
            most = min(budget, threads * 24 * 64) // 24
            assert images.shape[0] * images.shape[1] <= max(1, most)
        assert torch.equal(found, ids.float())
        together = max(1, min(threads, queries, budget // 24))
        assert all(first % together == 0 for first in firsts)
