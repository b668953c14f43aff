"""Products in blocks against whole ones; the largest against a sort; the buffer."""

import threading

import pytest
import torch
from torch import Tensor

from nnflow import products as module
from nnflow.products import Buffer, scores_of, weighted


def rows_of(count: int, width: int = 20) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count)).bfloat16()


@pytest.fixture(params=[True, False], ids=["bfloat16", "float32"])
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(module, "bfloat16_is_fast", lambda device: request.param)
    monkeypatch.setattr(module, "_BLOCK_ROWS", 96)
    return bool(request.param)


@pytest.mark.parametrize(
    ("count", "k"), [(5000, 3), (5001, 40), (5015, 1), (40, 40), (47, 2), (16, 1), (250, 9)]
)
def test_logits_and_the_highest_of_them(count: int, k: int, fast: bool) -> None:
    rows, row = rows_of(count), rows_of(6)
    rows[-1] = 9 * row[0]  # the largest of the first query lies beyond the last whole group
    found = scores_of(row, rows, Buffer())
    wanted = row.float() @ rows.float().T
    torch.testing.assert_close(found.values.float(), wanted, rtol=2**-8, atol=1e-5)
    values, places = found.highest(k)
    assert torch.equal(values, found.values.sort(1, descending=True).values[:, :k])
    assert torch.equal(values, found.values.gather(1, places))
    assert places[0, 0] == count - 1
    # an image that is met more than once among equals would be counted twice
    assert all(len(set(row)) == k for row in places.tolist())


def test_each_query_with_images_of_its_own(fast: bool) -> None:
    rows, row = rows_of(60).view(6, 10, 20), rows_of(6)
    found = scores_of(row, rows, Buffer())
    torch.testing.assert_close(
        found.values.float(), torch.einsum("ba,bka->bk", row.float(), rows.float()), rtol=2**-8, atol=1e-5
    )
    values, places = found.highest(4)
    assert torch.equal(values, found.values.gather(1, places))
    assert torch.equal(values[:, 0], found.values.amax(1))


@pytest.mark.parametrize("own", [True, False])
def test_weighted_sums(own: bool, fast: bool) -> None:
    scores = 3 * torch.randn(6, 330, generator=torch.Generator().manual_seed(0))
    scores[:, 7] = -torch.inf
    rows = rows_of(6 * 330).view(6, 330, 20) if own else rows_of(330)
    found = weighted(scores, scores.amax(1), rows)
    weights = (scores - scores.amax(1, keepdim=True)).double().exp()
    torch.testing.assert_close(found.log_mass, weights.sum(1).log(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.log_square, weights.square().sum(1).log(), rtol=1e-5, atol=1e-6)
    each = rows.double() if own else rows.double().expand(6, -1, -1)
    mean = torch.einsum("bk,bka->ba", weights / weights.sum(1, keepdim=True), each)
    torch.testing.assert_close(found.mean.double(), mean, rtol=0.02, atol=3e-3)


def test_a_buffer_is_one_for_each_thread() -> None:
    buffer, like = Buffer(), torch.zeros(1)
    first = buffer.take((3, 4), like)
    assert buffer.take((2, 5), like).data_ptr() == first.data_ptr()
    assert buffer.take((30, 4), like).shape == (30, 4)
    assert buffer.take((2, 2), torch.zeros(1).bfloat16()).dtype == torch.bfloat16
    here, there = buffer.take((3, 4), like), []
    thread = threading.Thread(target=lambda: there.append(buffer.take((3, 4), like)))
    thread.start()
    thread.join()
    assert there[0].data_ptr() != here.data_ptr()
