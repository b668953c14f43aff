"""How long the fields take on a device, and a training step's targets beside the step of a large network."""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from gpu_bench import Bench, Line, pairs, placed, supports, synthetic
from torch import Tensor
from torch.nn import functional

from nnflow import EmpiricalVelocity
from nnflow.config import resolve
from nnflow.farfield import NearAndFar
from nnflow.ladder import Ladder
from nnflow.memory import DEFAULT_BUDGET, format_bytes
from nnflow.path import interpolate
from nnflow.pixels import PixelRows
from nnflow.targets import make_matcher
from nnflow.unet import build

TIMED = ("64/100", "512/100")


def clocked(call: Callable[[], object], bench: Bench) -> tuple[str, float]:
    """Median, range and peak device memory of a call after two that are not counted; the median in s."""
    cuda = bench.device.type == "cuda"

    def finished() -> float:
        if cuda:
            torch.cuda.synchronize(bench.device)
        return time.perf_counter()

    call(), call()
    if cuda:
        torch.cuda.reset_peak_memory_stats(bench.device)
    taken = []
    for _ in range(bench.sizes.repeats):
        began = finished()
        call()
        taken.append(finished() - began)
    memory = format_bytes(torch.cuda.max_memory_allocated(bench.device)) if cuda else "-"
    median = statistics.median(taken)
    spread = f"{1000 * median:.3g} ms ({1000 * min(taken):.3g} to {1000 * max(taken):.3g})"
    return f"{spread}, peak {memory}", median


def fields(bench: Bench) -> Iterator[Line]:
    """What a batch of queries at t ~ U[0, 1] costs."""
    index = bench.data or synthetic(bench, *bench.sizes.timed, 128)
    t = torch.rand(bench.sizes.batch, generator=torch.Generator().manual_seed(0))
    x0, x1, _ = pairs(index, len(t), 0)
    x, t = interpolate(x0, x1, t).to(bench.device), t.to(bench.device)
    about = f"n = {len(index):,}, d = {x[0].numel():,}, {len(x)} queries"
    for name, make in supports(index, TIMED).items():
        for place, field in placed(make, index, bench):
            found, _ = clocked(partial(field, x, t), bench)
            yield Line("speed", f"{name}, {place}; {about}", found, "", True)


def training(bench: Bench) -> Iterator[Line]:
    """A training step's targets beside the step of a large network, 64 x 64 images."""
    index = synthetic(bench, *bench.sizes.timed, 128)
    t = torch.rand(bench.sizes.batch, generator=torch.Generator().manual_seed(1))
    x0, x1, ids = pairs(index, len(t), 1)
    x0, x1, t, ids = (part.to(bench.device) for part in (x0, x1, t, ids))
    ladder = Ladder.parse(TIMED[-1])
    field = EmpiricalVelocity(
        NearAndFar(index, PixelRows(index.store.pixels, bench.device), ladder=ladder, budget=DEFAULT_BUDGET),
        index.store,
    )
    costs = {}
    for name in ("efm", "efm-unbiased"):
        matcher = make_matcher(name, index.store, field=field)
        asked = partial(matcher.sample_location_and_conditional_flow, x0, x1, t, ids=ids)
        found, costs[name] = clocked(asked, bench)
        yield Line("training", f"targets {name} by {ladder}, {len(ids)} pairs, none settled", found, "", True)
    xt, ut = interpolate(x0, x1, t), x1 - x0
    network = build(resolve("cifar10", bench.sizes.unet), index.store.shape[1:]).to(bench.device).train()
    step = Step(network, torch.optim.Adam(network.parameters()), xt, t, ut)
    found, whole = clocked(step, bench)
    size = f"{sum(part.numel() for part in network.parameters()) / 1e6:.0f} M parameters"
    about = f"U-Net step, bfloat16, {size}, {len(ids)} images" + f" in {step.parts} parts" * (step.parts > 1)
    yield Line("training", about, found, "", True)
    for name, cost in costs.items():
        share = f"{100 * cost / whole:.2g} % of the U-Net's step"
        yield Line("training", f"targets {name} beside it", share, "", True)


class Step:
    """Forward, backward, Adam; the batch in halves, quarters ... where the device lacks memory for all."""

    def __init__(
        self, network: torch.nn.Module, adam: torch.optim.Optimizer, xt: Tensor, t: Tensor, ut: Tensor
    ) -> None:
        self.network, self.adam, self.batch, self.parts = network, adam, (xt, t, ut), 1

    def __call__(self) -> None:
        """One step."""
        while True:
            self.adam.zero_grad(set_to_none=True)
            try:
                self._backward()
            except torch.OutOfMemoryError:
                if self.parts >= len(self.batch[0]):
                    raise
            else:
                break
            self.parts *= 2  # here, where the error no longer holds on to what did not fit
            torch.cuda.empty_cache()
        self.adam.step()

    def _backward(self) -> None:
        for xt, t, ut in zip(*(part.chunk(self.parts) for part in self.batch), strict=True):
            with torch.autocast(xt.device.type, torch.bfloat16):
                loss = functional.mse_loss(self.network(xt, t), ut)
            (loss * (len(xt) / len(self.batch[0]))).backward()
