"""Batches are the same whenever and wherever they are made; what is made ahead is waited for, and ends."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peaks import peak_of
from runs import workers
from stores import store_of
from torch import Tensor

from nnflow import batches as module
from nnflow.batches import Batch, Batches, supply
from nnflow.config import TrainConfig, resolve
from nnflow.errors import InputError
from nnflow.filemap import let_go
from nnflow.index import NeighbourIndex
from nnflow.store import ImageStore
from nnflow.targets import EmpiricalFlowMatcher, Pairs, Target, make_matcher
from nnflow.velocity import EmpiricalVelocity

CPU = torch.device("cpu")
WAIT = 60  # seconds after which something hangs
SIDE = 8


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (60, 1, SIDE, SIDE), generator=generator).byte()
    return store_of(pixels, tmp_path_factory.mktemp("store"), classes=["a"] * 25 + ["b"] * 35)


@pytest.fixture(scope="module")
def index(store: ImageStore) -> NeighbourIndex:
    return NeighbourIndex.build(store, store.folder, rank=16)


def config_of(**knobs: object) -> TrainConfig:
    return resolve("digits", {"flip": True, "class_conditional": True, "samples": 5, "batch": 6} | knobs)


def made_of(store: ImageStore, matcher: EmpiricalFlowMatcher, *, rank: int = 0, **knobs: object) -> Batches:
    config = config_of(**knobs)
    return Batches(store, matcher, config, size=config.batch, rank=rank, device=CPU)


@pytest.fixture
def batches(store: ImageStore) -> Batches:
    return made_of(store, make_matcher("efm-m", store, samples=5, flip=True))


def same(one: Batch, other: Batch) -> bool:
    pairs = zip(one.tensors(), other.tensors(), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_a_batch_depends_on_seed_step_and_process_alone(store: ImageStore, batches: Batches) -> None:
    forth = [batches.make(step) for step in range(4)]
    torch.manual_seed(9)
    before = torch.get_rng_state()
    back = [batches.make(step) for step in reversed(range(4))][::-1]
    assert torch.equal(torch.get_rng_state(), before)  # a thread must not draw what dropout draws
    assert all(same(one, other) for one, other in zip(forth, back, strict=True))
    others = [
        batches.make(4),
        made_of(store, batches.matcher, rank=1).make(3),
        made_of(store, batches.matcher, seed=1).make(3),
    ]
    for other in others:
        for one, its in zip(forth[3].tensors()[:3], other.tensors()[:3], strict=True):
            assert not torch.equal(one, its)


@pytest.mark.parametrize("ahead", [False, True])
def test_every_step_gets_its_batch_and_the_thread_ends(batches: Batches, ahead: bool) -> None:
    with supply(batches, range(3, 9), ahead=ahead) as batch_of:
        assert len(workers()) == ahead
        for step in range(3, 9):
            assert same(batch_of(step), batches.make(step))
    assert not workers()


def test_no_more_than_two_wait_and_none_beyond_the_last(store: ImageStore) -> None:
    """What is ahead costs memory, and a step that never comes would be made for nothing."""
    made: list[int] = []

    class Counted(Batches):
        def make(self, step: int) -> Batch:
            made.append(step)
            return super().make(step)

    counted = Counted(store, make_matcher("cfm", store), config_of(), size=2, rank=0, device=CPU)
    with supply(counted, range(5), ahead=True) as batch_of:
        for step in range(5):
            batch_of(step)
            idle = time.monotonic() + WAIT
            while len(made) < min(5, step + 3) and time.monotonic() < idle:
                time.sleep(0.001)
            time.sleep(0.01)
            assert made == list(range(min(5, step + 3)))
    with supply(counted, range(5, 5), ahead=True):
        pass
    assert made == list(range(5))


class Hooked(Target):
    """x1 - x0, once `hook` has been called with the number of the call."""

    def __init__(self, hook: Callable[[int], None]) -> None:
        self.hook, self.calls = hook, 0

    def __call__(self, pairs: Pairs) -> Tensor:
        self.calls += 1
        self.hook(self.calls - 1)
        return pairs.x1 - pairs.x0


def hooked(store: ImageStore, hook: Callable[[int], None]) -> Batches:
    return made_of(store, EmpiricalFlowMatcher(Hooked(hook)))


def test_a_batch_is_made_while_the_network_has_the_one_before(store: ImageStore) -> None:
    """Each batch is held back until the network has the one before; without a thread for ever."""
    begun = [threading.Event() for _ in range(4)]

    def hold(step: int) -> None:
        assert step == 0 or begun[step - 1].wait(WAIT), "the network waits for a batch it cannot have yet"

    with supply(hooked(store, hold), range(4), ahead=True) as batch_of:
        for step in range(4):
            batch_of(step)
            begun[step].set()
    assert not workers()


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("kind", [InputError, MemoryError])
def test_an_error_is_raised_in_the_step_that_needs_the_batch(
    store: ImageStore, ahead: bool, kind: type[Exception]
) -> None:
    def fail(step: int) -> None:
        if step == 2:
            raise kind("the disk is gone")

    taken: list[int] = []

    def steps() -> None:
        with supply(hooked(store, fail), range(9), ahead=ahead) as batch_of:
            for step in range(9):
                batch_of(step)
                taken.append(step)

    with pytest.raises(kind, match=r"^the disk is gone$"):
        steps()
    assert taken == [0, 1]
    assert not workers()


def test_leaving_early_ends_the_thread_after_the_batch_it_has_begun(store: ImageStore) -> None:
    begun, go_on, calls = threading.Event(), threading.Event(), []

    def hold(step: int) -> None:
        calls.append(step)
        if step == 1:
            begun.set()
            assert go_on.wait(WAIT)

    def interrupted() -> None:
        with supply(hooked(store, hold), range(5), ahead=True) as batch_of:
            batch_of(0)
            assert begun.wait(WAIT)
            threading.Timer(0.05, go_on.set).start()  # while the block is being left
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not workers()
    assert calls == [0, 1]


def mapped_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().split("\n") if "RssFile" in line)
    return int(line.split()[1]) << 10


@pytest.mark.parametrize(("memory", "stays"), [("256MiB", True), ("4MiB", False)])
def test_rows_are_read_from_the_map_and_their_pages_let_go(tmp_path: Path, memory: str, stays: bool) -> None:
    """Of 23 MiB of bytes, 92 MiB in float32, a batch of 64 takes 1 MiB; pages stay where memory has room."""
    pixels = np.random.default_rng(0).integers(256, size=(8_000, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    store = ImageStore.build(tmp_path / "images.npy", tmp_path / "out", size=32)
    batches = made_of(store, make_matcher("cfm", store), class_conditional=False, batch=64, memory=memory)
    let_go(store.pixels)
    before = mapped_bytes()
    for step in range(20):
        batches.make(step)
    grown = mapped_bytes() - before
    assert (grown > 8 << 20) if stays else (grown < 1 << 20)
    assert peak_of(lambda: batches.make(20)) < 20 * 64 * 4 * 3072 < pixels.nbytes


def fields(store: ImageStore, index: NeighbourIndex) -> dict[str, EmpiricalVelocity]:
    return {
        "exact": EmpiricalVelocity.exact(store, flip=True, device="cpu"),
        "nearest": EmpiricalVelocity.nearest(index, k=5, flip=True, device="cpu"),
        "near and far": EmpiricalVelocity.near_and_far(index, k=5, rank=8, flip=True, device="cpu"),
        "levels": EmpiricalVelocity.near_and_far(index, levels=[(32, 20), (60, 5)], flip=True, device="cpu"),
    }


@pytest.mark.parametrize("name", ["exact", "nearest", "near and far", "levels"])
@pytest.mark.parametrize("target", ["efm", "efm-unbiased"])
def test_a_field_answers_two_threads_at_once_as_it_answers_one(
    store: ImageStore, index: NeighbourIndex, name: str, target: str
) -> None:
    """While the thread asks, `on_sample` may ask too: of the same field, bit for bit."""
    field = fields(store, index)[name]
    batches = made_of(store, make_matcher(target, store, field=field, flip=True), batch=16)
    alone = [batches.make(step) for step in range(5)]
    begin = threading.Barrier(2)

    def ask(steps: range, into: dict[int, Batch]) -> None:
        begin.wait(WAIT)
        into.update({step: batches.make(step) for step in steps})

    found: tuple[dict[int, Batch], ...] = ({}, {})
    threads = [
        threading.Thread(target=ask, args=(steps, into))
        for steps, into in zip((range(5), range(4, -1, -1)), found, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for into in found:
        assert all(same(into[step], alone[step]) for step in range(5))


class FakeCuda:
    """What of `torch.cuda` a side stream needs, written down as it is asked for."""

    def __init__(self, told: list[str]) -> None:
        self.told = told
        self.now = threading.local()

    def Stream(self, device: torch.device) -> "FakeStream":  # noqa: N802
        return FakeStream("side", self.told)

    def current_stream(self, device: torch.device | None = None) -> "FakeStream":
        return getattr(self.now, "stream", FakeStream("main", self.told))

    def stream(self, stream: "FakeStream") -> "FakeCuda":
        self.entered = stream
        return self

    def __enter__(self) -> None:
        self.now.stream = self.entered

    def __exit__(self, *_: object) -> None:
        del self.now.stream

    def Event(self) -> "FakeEvent":  # noqa: N802
        return FakeEvent(self)


class FakeStream:
    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self.told = name, told

    def wait_stream(self, other: "FakeStream") -> None:
        self.told.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: "FakeEvent") -> None:
        self.told.append(f"{self.name} waits for event on {event.on}")


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.on = cuda, ""

    def record(self) -> None:
        self.on = self.cuda.current_stream().name


def test_on_a_gpu_the_networks_stream_waits_for_the_side_stream(
    batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is none here: the order of calls is what is checked, on stand-ins for torch.cuda."""
    told: list[str] = []
    cuda = FakeCuda(told)

    class OnGpu(Batches):
        def make(self, step: int) -> Batch:
            told.append(f"step {step} made on {cuda.current_stream().name}")
            return batches.make(step)

    there = OnGpu(
        batches.store, batches.matcher, batches.config, size=6, rank=0, device=torch.device("cuda", 0)
    )
    monkeypatch.setattr(module.torch, "cuda", cuda)
    monkeypatch.setattr(Tensor, "record_stream", lambda _, stream: told.append(f"kept for {stream.name}"))
    with supply(there, range(1), ahead=True) as batch_of:
        found = batch_of(0)
    assert same(found, batches.make(0))
    kept = ["kept for main"] * len(found.tensors())
    assert told == [
        "side waits for main",
        "step 0 made on side",
        "main waits for event on side",
        *kept,
    ]
