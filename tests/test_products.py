"""Products in blocks against whole ones in float64; the largest against a sort; the buffer."""

import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
from contract import DEVICE
from logits import as_scores, logits_of
from torch import Tensor

from nnflow import integers, laidout
from nnflow import products as module
from nnflow.laidout import Adding, LaidOut, Rows
from nnflow.products import Buffer, masses, scores_of, weighted

R = 20


def rows_of(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(-127, 128, (count, R), generator=generator, dtype=torch.int8).to(DEVICE)


def queries(count: int = 6) -> tuple[Tensor, Tensor]:
    """Rows of values and falls that make logits of a few tens."""
    generator = torch.Generator().manual_seed(9)
    row, fall = torch.randn(count, R, generator=generator) / 30, torch.rand(count, generator=generator)
    return row.to(DEVICE), fall.to(DEVICE)


def squares_of(*shape: int) -> Tensor:
    return 30 * torch.rand(shape, generator=torch.Generator().manual_seed(4)).to(DEVICE)


Lay = Callable[[Tensor], Rows]


@pytest.fixture(params=["laid out", "laid out, all queries at once", "bytes", "float32"])
def lay(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Lay:
    """All images' rows in blocks of 96, as this processor would have them or as another."""
    laid = request.param.startswith("laid out")
    if laid and (str(DEVICE) != "cpu" or not integers.factor_levels()):
        pytest.skip("nothing to lay rows out for")
    if request.param == "bytes" and not integers.are_fast():
        pytest.skip("this processor has no exact products of bytes")
    fast = request.param != "float32"
    monkeypatch.setattr(integers, "are_fast", lambda: fast)
    monkeypatch.setattr(laidout, "MOST_ROWS", 96)
    for user in (laidout, module):
        monkeypatch.setattr(user, "block_rows", lambda queries: 96)
    if request.param != "laid out, all queries at once":
        for user in (Rows, integers.Factor, integers.ShortFactor):
            monkeypatch.setattr(user, "most_added", 96 * 4)
    return partial(LaidOut, cuts=(8, 13)) if laid else Rows


@pytest.mark.parametrize(
    ("count", "k"), [(5000, 3), (5001, 40), (5015, 1), (5080, 7), (40, 40), (47, 2), (16, 1), (250, 9)]
)
@pytest.mark.parametrize("many", [1, 1 << 11])
def test_logits_and_the_highest_of_them(
    count: int, k: int, many: int, lay: Lay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MANY", many)
    rows, squares, (row, fall) = rows_of(count), squares_of(count), queries()
    rows[-1] = (127 * row[0] / row[0].abs().max()).to(torch.int8)  # the first query's largest is in no group
    squares[-1] = 0
    found = scores_of(row, fall, lay(rows), squares, Buffer())
    wanted = row.double() @ rows.double().T - fall.double()[:, None] * squares.double()
    # half a unit of each value, 1e-5 of the largest, times 127
    logits = logits_of(found)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=R * 127 * 1.6e-5 * 0.15)
    torch.testing.assert_close(found.largest().double(), logits.amax(1), rtol=1e-6, atol=0)
    values, places = found.highest(k)
    torch.testing.assert_close(
        values.double(), logits.sort(1, descending=True).values[:, :k], rtol=1e-6, atol=0
    )
    torch.testing.assert_close(values.double(), logits.gather(1, places), rtol=1e-6, atol=0)
    assert places[0, 0] == count - 1
    # an image that is met more than once among equals would be counted twice
    assert all(len(set(row)) == k for row in places.tolist())


@pytest.mark.parametrize("count", [5000, 5001, 250, 40])
def test_images_left_out_weigh_nothing(count: int, lay: Lay) -> None:
    (row, fall), laid = queries(), lay(rows_of(count))
    found = scores_of(row, fall, laid, squares_of(count), Buffer())
    wanted = logits_of(found)
    _, places = found.highest(9)
    which = torch.arange(9, device=DEVICE) < torch.tensor([9, 0, 3, 1, 8, 2], device=DEVICE)[:, None]
    found.leave_out(places, which)
    for query, (mine, gone) in enumerate(zip(places, which, strict=True)):
        wanted[query, mine[gone]] = -torch.inf
    assert torch.equal(logits_of(found), wanted)
    torch.testing.assert_close(found.largest().double(), wanted.amax(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("fine", [True, False])
@pytest.mark.parametrize("count", [1, 6, 7, 40, 103])
def test_queries_are_multiplied_so_many_at_a_time_that_what_is_made_is_small(
    count: int, fine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rows, "most_added", 96 * 4)
    monkeypatch.setattr(laidout, "block_rows", lambda queries: 96)
    row, fall = queries(count)
    made: list[Tensor] = []

    class Counted(Rows):
        def adding(self, digits: Tensor, scale: float) -> Adding:
            add = super().adding(digits, scale)

            def counted(images: slice, to: Tensor) -> None:
                made.append(to)
                add(images, to)

            return counted

    scores_of(row, fall, Counted(rows_of(300)), squares_of(300), Buffer(), fine=fine)
    assert sum(some.numel() for some in made) == (2 if fine else 1) * count * 300
    sizes = [some.shape[0] for some in made]
    assert max(sizes) <= 4
    assert max(sizes) - min(sizes) <= 1
    assert len(made) == (2 if fine else 1) * 4 * -(-count // 4)


@pytest.mark.parametrize(
    ("fine", "tail", "digits"),
    [
        (True, 1 / 30, 1),  # what one digit of the others counts in is finer than two of the first reach
        (True, 1e-6, 2),  # and here it is not: two digits must reach
        (True, 30, 1),  # the first are but a low digit
        (False, 1, 1),
    ],
)
def test_logits_are_off_by_no_more_than_half_a_unit_of_each_coordinate(
    fine: bool, tail: float, digits: int, lay: Lay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEAD", 8)
    rows, squares, (row, fall) = rows_of(500), squares_of(500), queries()
    row[:, 8:] *= tail
    laid = lay(rows)
    found = scores_of(row, fall, laid, squares, Buffer(), fine=fine)
    wanted = row.double() @ rows.double().T - fall.double()[:, None] * squares.double()
    largest = (row if not fine else row[:, 8:] if digits == 1 else row[:, :8]).abs().amax(1)
    torch.testing.assert_close(found.unit, largest / (laid.levels if digits == 1 else 2 * laid.levels**2))
    allowed = 0.5 * found.unit.double()[:, None] * rows.abs().double().sum(1)
    off = (logits_of(found) - wanted).abs()
    assert (off <= 1.001 * allowed + 1e-5).all()
    assert (off.mean(1) > 0.02 * allowed.mean(1)).all(), "the allowance would cover anything"


def test_each_query_with_images_of_its_own(lay: Lay) -> None:
    rows, squares, (row, fall) = rows_of(60).view(6, 10, R), squares_of(6, 10), queries()
    found = scores_of(row, fall, rows, squares, Buffer())
    wanted = torch.einsum("ba,bka->bk", row.double(), rows.double()) - fall.double()[:, None] * squares
    torch.testing.assert_close(logits_of(found), wanted, rtol=0, atol=R * 127 * 1.6e-5 * 0.15)
    values, places = found.highest(4)
    torch.testing.assert_close(values.double(), logits_of(found).gather(1, places), rtol=1e-6, atol=0)
    torch.testing.assert_close(values[:, 0], found.largest())


def some_scores(count: int) -> Tensor:
    scores = 3 * torch.randn(6, count, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    scores[:, 7] = -torch.inf
    scores[1] -= 300
    return scores


@pytest.mark.parametrize("asked", [[0, 1, 2, 3, 4, 5], [4, 1], []])
def test_masses(asked: list[int]) -> None:
    scores = some_scores(330)
    chosen = torch.tensor(asked, dtype=torch.int64, device=DEVICE)
    found, squares = masses(as_scores(scores, 96), scores.amax(1) + 1, chosen)
    torch.testing.assert_close(found, scores[asked].double().logsumexp(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(squares, (2 * scores[asked].double()).logsumexp(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("asked", [[0, 1, 2, 3, 4, 5], [4, 1], []])
@pytest.mark.parametrize("rank", [R, 7])
def test_weighted_means(own: bool, asked: list[int], rank: int, lay: Lay) -> None:
    scores = some_scores(330)
    rows = rows_of(6 * 330).view(6, 330, R) if own else rows_of(330)
    laid = rows if own else lay(rows)
    chosen = torch.tensor(asked, dtype=torch.int64, device=DEVICE)
    found = weighted(as_scores(scores, 330 if own else 96), scores.amax(1), laid, chosen, rank, Buffer())
    torch.testing.assert_close(found.log_mass, scores[asked].double().logsumexp(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        found.log_square, (2 * scores[asked].double()).logsumexp(1), rtol=1e-6, atol=1e-6
    )
    weights = (scores - scores.amax(1, keepdim=True)).double().exp()[asked]
    each = rows.double()[asked] if own else rows.double().expand(len(asked), -1, -1)
    # up or down by the multiple of the golden ratio of the image's place, whatever the block
    whole = (127 * weights + (torch.arange(1.0, 331.0).double() * 0.6180339887498949).frac()).floor()
    wanted = torch.einsum("bk,bka->ba", whole / whole.sum(1, keepdim=True), each)
    # a weight that lies between two whole numbers may go either way: bytes of 127 by one of 127 and more
    torch.testing.assert_close(found.mean.double(), wanted[:, :rank], rtol=0, atol=2.0)
    exact = torch.einsum("bk,bka->ba", weights / weights.sum(1, keepdim=True), each)
    noise = 127 / 3**0.5 / (127 * weights.sum(1, keepdim=True)).sqrt()  # of bytes spread over -127 ... 127
    off = (found.mean.double() - exact[:, :rank]).square().mean(1, keepdim=True).sqrt()
    assert (off < noise).all()


def test_half_of_the_mass_in_weights_that_round_to_nothing_is_not_lost(lay: Lay) -> None:
    """One image of weight 1 and 96,000 of 1/96,000 each, 1/760 of a 127th: the mean is half of either."""
    rows = torch.full((96_001, R), -100, dtype=torch.int8)
    rows[0] = 100
    scores = torch.full((1, 96_001), -torch.tensor(96_000.0).log().item())
    scores[0, 0] = 0.0
    found = weighted(as_scores(scores, 96), torch.zeros(1), lay(rows), torch.arange(1), R, Buffer())
    torch.testing.assert_close(found.mean, torch.zeros(1, R), rtol=0, atol=10.0)


def test_weighing_leaves_the_scores_of_its_buffer_as_they_are(lay: Lay) -> None:
    (row, fall), rows, buffer = queries(), lay(rows_of(333)), Buffer()
    scores = scores_of(row, fall, rows, squares_of(333), buffer)
    before, asked = scores.held.clone(), torch.tensor([4, 1], device=DEVICE)
    weighted(scores, scores.largest(), rows, asked, R, buffer)
    assert torch.equal(scores.held, before)


@pytest.mark.parametrize("own", [True, False])
def test_rounded_logits_of_a_million_overflow_no_byte(own: bool, lay: Lay) -> None:
    scores = torch.full((6, 40), 1e6, device=DEVICE)
    scores[:, 3] += 0.25  # above `top`: 127 exp(1/4) would be 163
    rows = rows_of(240).view(6, 40, R) if own else rows_of(40)
    laid = rows if own else lay(rows)
    top, asked = torch.full((6,), 1e6, device=DEVICE), torch.arange(6, device=DEVICE)
    found = weighted(as_scores(scores, 40), top, laid, asked, R, Buffer())
    wanted = rows.double().mean(1) if own else rows.double().mean(0).expand(6, -1)
    torch.testing.assert_close(found.mean.double(), wanted, rtol=0, atol=0.01)


@pytest.mark.parametrize("count", [40, 333, 5001])
def test_the_bound_on_a_sum_is_one_and_no_more_than_sixteen_times_it(count: int, lay: Lay) -> None:
    rows, squares, (row, fall) = rows_of(count), squares_of(count), queries()
    found = scores_of(row, fall, lay(rows), squares, Buffer())
    top = found.highest(5)[0][:, -1]
    wanted = torch.minimum(logits_of(found), top.double()[:, None]).logsumexp(1)
    bound = found.log_bound(top)
    assert (bound >= wanted).all()
    assert (bound <= wanted + torch.tensor(18.0).log()).all()


@pytest.mark.parametrize("queries", [0, 1, 12, 30, 90, 289, 100_000])
def test_blocks_are_powers_of_two_that_sum_within_int32(queries: int) -> None:
    rows = laidout.block_rows(queries)
    assert rows & (rows - 1) == 0
    assert rows % 16 == 0
    assert rows * 127**2 < 2**31
    assert rows * queries <= 1 << 19 or rows == 1 << 11


def test_a_buffer_is_one_for_each_thread() -> None:
    buffer, like = Buffer(), torch.zeros(1)
    first = buffer.take("logits", (3, 4), like)
    assert buffer.take("logits", (2, 5), like).data_ptr() == first.data_ptr()
    assert buffer.take("maxima", (2, 5), like).data_ptr() != first.data_ptr()
    assert buffer.take("logits", (30, 4), like).shape == (30, 4)
    here, there = buffer.take("logits", (3, 4), like), []
    thread = threading.Thread(target=lambda: there.append(buffer.take("logits", (3, 4), like)))
    thread.start()
    thread.join()
    assert there[0].data_ptr() != here.data_ptr()
