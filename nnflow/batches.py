"""The batch of a step (images, noise, times, and the target there), made when it is due or ahead of it.

Everything random in step s of process r is drawn from (seed, s, r) alone, so a batch is the same whenever
and in whichever thread it is made.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nnflow.config import TrainConfig
from nnflow.diary import Stopwatch
from nnflow.filemap import let_go
from nnflow.memory import parse_bytes
from nnflow.store import ImageStore
from nnflow.tally import Tally
from nnflow.targets import EmpiricalFlowMatcher

_AHEAD = 2  # batches in waiting: one would do, were the field not asked about more pairs in some than others


@dataclass(frozen=True)
class Batch:
    """What a step needs.

    Attributes:
        t: times.
        xt: points on the paths.
        ut: what to regress on there.
        labels: classes, where the network is told.
        estimates: sums of a `Tally` over the estimates behind `ut`.
    """

    t: Float[Tensor, " B"]
    xt: Float[Tensor, "B C H W"]
    ut: Float[Tensor, "B C H W"]
    labels: Int[Tensor, " B"] | None
    estimates: Float[Tensor, " s"]

    def tensors(self) -> list[Tensor]:
        """All of it."""
        some = (self.t, self.xt, self.ut, self.labels, self.estimates)
        return [tensor for tensor in some if tensor is not None]


def seed_of(seed: int, step: int, rank: int) -> int:
    """A seed for what is random in one step of one process; unlike seed + step, runs share none."""
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Batches:
    """Makes the batch of any step.

    Args:
        store: the training images; rows are read from its map as they are needed.
        matcher: what makes targets of them.
        config: of the run.
        size: pairs of this process.
        rank: which process this is.
        device: where batches are wanted.
    """

    def __init__(
        self,
        store: ImageStore,
        matcher: EmpiricalFlowMatcher,
        config: TrainConfig,
        *,
        size: int,
        rank: int,
        device: torch.device,
    ) -> None:
        self.store, self.matcher, self.config = store, matcher, config
        self.size, self.rank, self.device = size, rank, device
        self.clock = Stopwatch(device)  # of the targets alone
        self._large = 4 * store.pixels.nbytes > parse_bytes(config.memory)  # as `PixelRows.let_go` has it

    def make(self, step: int) -> Batch:
        """The batch of `step`.

        Drawn on the CPU, so that a run sees the same batches on any device; its pixels travel as bytes.
        """
        generator = torch.Generator().manual_seed(seed_of(self.config.seed, step, self.rank) ^ 1)
        size, place = self.size, self.device
        ids = torch.randint(len(self.store), (size,), generator=generator)
        x1 = self.store.images(ids.to(place))
        if self._large:
            let_go(self.store.pixels)
        x0 = torch.randn(x1.shape, generator=generator).to(place)
        t = torch.rand(size, generator=generator).to(place)
        flipped = None
        if self.config.flip:
            flipped = (torch.rand(size, generator=generator) < 0.5).to(place)
            x1 = torch.where(flipped[:, None, None, None], x1.flip(-1), x1)
        labels = self.store.labels[ids].to(place) if self.config.class_conditional else None
        tally = Tally(place, tolerance=self.config.tolerance)
        with self.clock.running():
            t, xt, ut = self.matcher.sample_location_and_conditional_flow(
                x0,
                x1,
                t,
                ids=ids.to(place),
                labels=labels,
                flipped=flipped,
                generator=generator,
                tally=tally,
            )
        return Batch(t, xt, ut, labels, tally.sums)


@contextlib.contextmanager
def supply(batches: Batches, steps: range, *, ahead: bool) -> Iterator[Callable[[int], Batch]]:
    """Gives the batches of `steps` in order: made when asked for, or `ahead` of that by a thread.

    What the thread raises is raised where the batch it was making is asked for. The thread ends with the
    block, after the batch it has begun.
    """
    if not ahead:
        yield batches.make
        return
    with contextlib.closing(_Ahead(batches, steps)) as thread:
        yield thread.take


class _Ahead:
    """One thread that makes the next few batches; on a GPU in a stream of its own.

    A thread there too: targets ask the device for numbers (how many pairs have settled, how many candidates
    matter), and the thread of the network must not wait for the answers.
    """

    def __init__(self, batches: Batches, steps: range) -> None:
        self._batches, self._steps = batches, iter(steps)
        self._stream = None
        if batches.device.type == "cuda":
            self._stream = torch.cuda.Stream(batches.device)
            self._stream.wait_stream(torch.cuda.current_stream(batches.device))  # the field's own tensors
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="nnflow-targets")
        self._waiting: list[tuple[int, Future[tuple[Batch, Any]]]] = []
        self._fill()

    def take(self, step: int) -> Batch:
        """The batch of the next step, which must be `step`."""
        due, future = self._waiting.pop(0)
        assert due == step
        self._fill()
        batch, ready = future.result()
        if ready is not None:
            here = torch.cuda.current_stream(self._batches.device)
            here.wait_event(ready)
            for tensor in batch.tensors():
                tensor.record_stream(
                    here
                )  # its memory was the other stream's, and is in use here until freed
        return batch

    def close(self) -> None:
        """Ends the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _fill(self) -> None:
        while len(self._waiting) < _AHEAD and (step := next(self._steps, None)) is not None:
            self._waiting.append((step, self._pool.submit(self._make, step)))

    def _make(self, step: int) -> tuple[Batch, Any]:
        if self._stream is None:
            return self._batches.make(step), None
        with torch.cuda.stream(self._stream):
            batch = self._batches.make(step)
            ready = torch.cuda.Event()
            ready.record()
        return batch, ready
