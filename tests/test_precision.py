"""A caller who allows TF32 gets the same field, and finds the switches as they were."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from contract import pixels_of
from stores import store_of

from nnflow import precision, scan
from nnflow.errors import InputError
from nnflow.precision import full_float32
from nnflow.scan import nearest_images
from nnflow.store import ImageStore
from nnflow.velocity import EmpiricalVelocity

NEW = hasattr(torch.backends.cuda.matmul, "fp32_precision")


def legacy(word: str) -> Callable[[], None]:
    return lambda: torch.set_float32_matmul_precision(word)


def allow_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def everywhere() -> None:
    if not NEW:
        pytest.skip("this torch has no switch for all backends")
    torch.backends.fp32_precision = "tf32"


ALLOWED = {"high": legacy("high"), "medium": legacy("medium"), "allow_tf32": allow_tf32, "all": everywhere}


def switches() -> tuple[object, ...]:
    if not NEW:
        return torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32
    backends = torch.backends
    return backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision, backends.fp32_precision


def fresh() -> None:
    """As in a process that has set none of them."""
    torch.set_float32_matmul_precision("highest")
    if NEW:
        for each in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
            each.fp32_precision = "none"


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    fresh()
    yield
    fresh()


def full() -> bool:
    if not NEW:
        return torch.get_float32_matmul_precision() == "highest"
    return set(switches()[:2]) <= {"ieee", "none"}


@pytest.mark.parametrize("allowed", ALLOWED)
def test_switches_are_up_inside_and_as_they_were_after(allowed: str) -> None:
    ALLOWED[allowed]()
    before = switches()
    assert not full()
    with full_float32():
        assert full()
        with full_float32():
            assert full()
        assert full()
    assert switches() == before
    if allowed != "all":  # where the older ones cannot be read with the new
        assert torch.get_float32_matmul_precision() == ("medium" if allowed == "medium" else "high")


def test_left_by_an_error_too() -> None:
    ALLOWED["high"]()
    before = switches()
    with pytest.raises(InputError, match="inside"), full_float32():
        raise InputError("inside")
    assert switches() == before
    assert precision._switches._inside == 0


def test_nothing_is_touched_where_nothing_was_allowed() -> None:
    before = switches()
    with full_float32():
        assert switches() == before
    assert switches() == before


def test_the_last_thread_out_restores() -> None:
    """The first one in finds what was allowed; the second, "highest", must not be taken for it."""
    ALLOWED["high"]()
    before, inside, leave = switches(), threading.Event(), threading.Event()

    def stay() -> None:
        with full_float32():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=stay)
    thread.start()
    inside.wait(60)
    with full_float32():
        pass
    assert full()
    leave.set()
    thread.join()
    assert switches() == before


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return store_of(pixels_of(40), tmp_path)


@pytest.mark.parametrize("allowed", ["high", "medium"])
def test_fields_and_neighbours_are_those_of_full_float32(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch, allowed: str
) -> None:
    """On a CPU with bfloat16 instructions "medium" rounds; elsewhere the switches alone can tell."""
    x = torch.randn(9, *store.shape[1:], generator=torch.Generator().manual_seed(0))
    field = EmpiricalVelocity.exact(store, device="cpu")
    wanted, near = field(x, 0.3), nearest_images(store, x, 3)
    ALLOWED[allowed]()
    before, seen, product = switches(), [], torch.mm

    def spy(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        seen.append(full())
        return product(one, other)

    monkeypatch.setattr(scan.torch, "mm", spy)
    assert torch.equal(field(x, 0.3), wanted)
    assert torch.equal(nearest_images(store, x, 3).distances, near.distances)
    with pytest.raises(InputError, match="NaN"):
        field(x * torch.nan, 0.3)
    assert len(seen) > 1
    assert all(seen)
    assert switches() == before
