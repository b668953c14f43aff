"""Cost and error of near + far beside the exact field on a large index, in one process and one table.

    scripts/bench_scale OUT                     a target batch, memorised samples, the exact field's stream
    scripts/bench_scale --growth OUT1 OUT2 ...  seconds of a target batch against the number of images
    scripts/bench_scale --build SOURCE          seconds and peak memory of `nnflow index SOURCE`

OUT was made by nnflow index and nnflow calibrate. What is compared is timed in turn on the same queries,
which lie on the paths of stored images at t ~ U[0, 1]; the first batch of each kind is not counted. Figures
are medians with their ranges, ratios those of neighbours.
"""

import argparse
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_main import seconds
from scale_build import build, machine
from scale_table import Spread, build_table, growth_table, index_table
from torch import Tensor

from nnflow import EmpiricalVelocity, NeighbourIndex, NNFlowError
from nnflow.calibration import Calibration
from nnflow.errors import InputError
from nnflow.memory import DEFAULT_BUDGET, parse_bytes
from nnflow.path import interpolate
from nnflow.pixels import PixelRows
from nnflow.planning import BATCH, Plan
from nnflow.sampling import sample
from nnflow.scan import AllImages, nearest_images
from nnflow.settling import read_settling
from nnflow.store import to_uint8
from nnflow.targets import EmpiricalFlowMatcher, make_matcher
from nnflow.velocity import Estimate

STREAM_TIME = 0.01  # so early that every image weighs: two products with all of them for every query
STREAM_RUNS = 3
HELD = 1 << 28  # bytes of the plain product's images, as float32
READ_ROWS = 1024
LANDED = 1e-3  # L2 distance of a sample to the stored image it ended on


@dataclass(frozen=True)
class Batch:
    """Pairs of noise and stored images at uniform times."""

    x0: Tensor
    x1: Tensor
    t: Tensor
    ids: Tensor

    @classmethod
    def drawn(cls, index: NeighbourIndex, generator: torch.Generator) -> "Batch":
        """Pairs whose images lie in `index`."""
        ids = torch.randint(len(index), (BATCH,), generator=generator)
        x1 = index.store.images(ids)
        x0 = torch.randn(x1.shape, generator=generator)
        return cls(x0, x1, torch.rand(BATCH, generator=generator), ids)

    def velocity(self, field: EmpiricalVelocity) -> Tensor:
        """What the field says of every pair's point."""
        return field(interpolate(self.x0, self.x1, self.t), self.t)

    def target(self, matcher: EmpiricalFlowMatcher) -> Tensor:
        """What the matcher would have a network regress on."""
        return matcher.sample_location_and_conditional_flow(self.x0, self.x1, self.t, ids=self.ids)[2]


class Noted(EmpiricalVelocity):
    """A field that keeps what it was asked."""

    def __init__(self, field: EmpiricalVelocity) -> None:
        super().__init__(field.support, field.store)
        self.asked: list[tuple[Tensor, Tensor | float]] = []

    def estimate(self, x: Tensor, t: Tensor | float, label: Tensor | int | None = None) -> Estimate:
        """As the field."""
        self.asked.append((x, t))
        return super().estimate(x, t, label)


class CountedRows(PixelRows):
    """Pixels that count the rows streamed."""

    streamed = 0

    def read(self, start: int, stop: int, into: Tensor) -> Tensor:
        """As any pixels."""
        self.streamed += stop - start
        return super().read(start, stop, into)


def timed(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    began = time.perf_counter()
    found = call()
    return time.perf_counter() - began, found


def peak_rss() -> int:
    """Most bytes this process has had in memory so far, mapped pages of files among them."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compare(
    index: NeighbourIndex, near: EmpiricalVelocity, exact: EmpiricalVelocity, options: argparse.Namespace
) -> dict[str, Any]:
    """Velocities, and targets where settling times are kept, by both fields on the same batches."""
    asked: dict[str, tuple[Callable[[Batch], Tensor], Callable[[Batch], Tensor]]] = {
        "velocity": (partial(Batch.velocity, field=near), partial(Batch.velocity, field=exact))
    }
    settling = read_settling(index.store)
    for name in () if settling is None else ("efm", "efm-unbiased"):
        by_near, by_exact = (
            make_matcher(name, index.store, field=field, settling=settling, memory=options.memory)
            for field in (near, exact)
        )
        asked[name] = partial(Batch.target, matcher=by_near), partial(Batch.target, matcher=by_exact)
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in asked}
    errors, generator = [], torch.Generator().manual_seed(options.seed)
    for number in range(options.batches + 1):
        batch = Batch.drawn(index, generator)
        for name, ways in asked.items():
            (quick, found), (slow, wanted) = (timed(partial(way, batch)) for way in ways)
            if number == 0:
                continue  # it fills caches, makes buffers
            runs[name].append((quick, slow))
            if name == "velocity":
                difference = (found - wanted).flatten(1).norm(dim=1)
                errors.append((difference / wanted.flatten(1).norm(dim=1)).double())
        print(f"batch {number} of {options.batches} done", file=sys.stderr, flush=True)
    return {"seconds": {name: _costs(pairs) for name, pairs in runs.items()}, "errors": _quantiles(errors)}


def _costs(pairs: Sequence[tuple[float, float]]) -> dict[str, Spread]:
    quick, slow = zip(*pairs, strict=True)
    return {
        "near_and_far": Spread.of(quick),
        "exact": Spread.of(slow),
        "ratio": Spread.of([one / other for other, one in pairs]),
    }


def _quantiles(errors: Sequence[Tensor]) -> dict[str, float]:
    every = torch.cat(list(errors))
    p50, p90, p99 = every.quantile(every.new_tensor([0.5, 0.9, 0.99])).tolist()
    return {"queries": len(every), "p50": p50, "p90": p90, "p99": p99, "worst": every.max().item()}


def memorised(
    index: NeighbourIndex, near: EmpiricalVelocity, exact: EmpiricalVelocity, options: argparse.Namespace
) -> dict[str, Any]:
    """Samples by both fields; where the exact one would take too long, some of the calls they need of it.

    Those are spread evenly over the calls of near + far: early ones cost more, and there are none after a
    sample has become one image, so neither fewer steps nor the first few of them would say what all cost.
    """
    noted = Noted(near)
    solved = partial(sample, start=range(options.seed, options.seed + options.samples), steps=options.steps)
    taken, images = timed(partial(solved, noted, batch=options.samples))
    calls = len(noted.asked)
    every = min(calls, math.ceil(seconds(partial(exact, *noted.asked[0])) * calls / options.patience))
    same = None
    if every == 1:
        measured, (whole, wanted) = calls, timed(partial(solved, exact, batch=options.samples))
        same = int((to_uint8(images) == to_uint8(wanted)).flatten(1).all(1).sum())
    else:
        some = noted.asked[every // 2 :: every]
        measured, whole = len(some), sum(seconds(partial(exact, *asked)) for asked in some)
    distances = nearest_images(index.store, images, 1, memory=options.memory).distances[:, 0]
    return {
        "samples": len(images),
        "steps": options.steps,
        "near_and_far": taken,
        "landed": int((distances <= LANDED).sum()),
        "same_image": same,
        "calls": calls,
        "exact_calls": measured,
        "exact_measured": whole,
    }


def streaming(index: NeighbourIndex, options: argparse.Namespace) -> dict[str, float]:
    """The exact field at its dearest, a plain product of the same shape, a plain read of the pixels."""
    pixels = index.store.pixels
    count, dim = pixels.shape
    rows = CountedRows(pixels)
    field = EmpiricalVelocity(AllImages(rows, budget=options.memory), index.store)
    x = torch.randn(BATCH, *index.store.shape[1:], generator=torch.Generator().manual_seed(options.seed))
    rows.streamed = 0
    field(x, STREAM_TIME)
    streamed = rows.streamed * dim
    flops = 4.0 * BATCH * count * dim
    taken = Spread.of([seconds(partial(field, x, STREAM_TIME)) for _ in range(STREAM_RUNS)]).median
    product, read = product_rate(pixels), read_rate(pixels)
    bounds = {"product": flops / product, "read": streamed / read}
    return {
        "t": STREAM_TIME,
        "seconds": taken,
        "passes": streamed / pixels.nbytes,
        "bytes_per_second": streamed / taken,
        "flop_per_second": flops / taken,
        "plain_flop_per_second": product,
        "plain_bytes_per_second": read,
        "product_share": bounds["product"] / taken,
        "read_share": bounds["read"] / taken,
    }


def product_rate(pixels: Tensor) -> float:
    """FLOP/s of (B, d) x (d, m) and (B, m) x (m, d), all in memory as float32."""
    held = min(len(pixels), max(1, HELD // (4 * pixels.shape[1])))
    images = pixels[:held].float()
    x, weights = torch.randn(BATCH, images.shape[1]), torch.empty(BATCH, held)
    mean = torch.empty_like(x)

    def products() -> None:
        torch.mm(x, images.T, out=weights)
        torch.mm(weights, images, out=mean)

    products()
    return 4 * BATCH * images.numel() / Spread.of([seconds(products) for _ in range(STREAM_RUNS)]).median


def read_rate(pixels: Tensor) -> float:
    """Bytes per second of the map, from first to last, into one buffer."""
    room = torch.empty(READ_ROWS, pixels.shape[1], dtype=torch.uint8)

    def read() -> None:
        for some in pixels.split(READ_ROWS):
            room[: len(some)].copy_(some)

    return pixels.nbytes / Spread.of([seconds(read) for _ in range(STREAM_RUNS)]).median


def in_short(plan: Plan) -> str:
    """Which ladder answers from which time on."""
    parts = groupby(zip((0.0, *plan.times), plan.ladders, strict=True), key=lambda part: part[1])
    return ", ".join(f"{name} from {next(iter(some))[0]:.3g}" for name, some in parts)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one index."""
    began = time.perf_counter()
    index = NeighbourIndex.open(options.out[0])
    settings = {"memory": options.memory, "device": "cpu"}
    near = EmpiricalVelocity.near_and_far(index, tolerance=options.tolerance, **settings)
    opening = time.perf_counter() - began
    Batch.drawn(index, torch.Generator().manual_seed(options.seed)).velocity(near)
    alone = peak_rss()
    norms, exact = time.perf_counter(), EmpiricalVelocity.exact(index.store, **settings)
    norms = time.perf_counter() - norms
    figures = machine() | {
        "n": len(index),
        "d": index.store.pixels.shape[1],
        "memory": options.memory,
        "tolerance": options.tolerance,
        "plan": in_short(Calibration.open(index).plan(options.tolerance)),
        "opening": opening,
        "opening_exact": norms,
        **compare(index, near, exact, options),
        "samples": memorised(index, near, exact, options),
        "rss_near_and_far": alone,
        "rss": peak_rss(),
    }
    return figures | {"stream": streaming(index, options)}


def growth(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a target batch of several indexes, in turn, and the power of n that fits them."""
    indexes = [NeighbourIndex.open(out) for out in options.out]
    counts = [len(index) for index in indexes]
    if len(set(counts)) < 2:
        raise InputError(f"--growth with indexes of {counts[0]} images only: wanted different numbers")
    fields = [
        EmpiricalVelocity.near_and_far(one, tolerance=options.tolerance, memory=options.memory, device="cpu")
        for one in indexes
    ]
    taken: list[list[float]] = [[] for _ in indexes]
    generator = torch.Generator().manual_seed(options.seed)
    for _ in range(options.batches + 1):
        for index, field, mine in zip(indexes, fields, taken, strict=True):
            mine.append(seconds(partial(Batch.drawn(index, generator).velocity, field)))
    spreads = [Spread.of(mine[1:]) for mine in taken]
    return machine() | {"n": counts, "seconds": spreads, "exponent": exponent(counts, spreads)}


def exponent(counts: Sequence[int], spreads: Sequence[Spread]) -> float:
    """The slope of the least-squares line of log time on log n."""
    times = np.log([spread.median for spread in spreads])
    return float(np.polyfit(np.log(counts), times, 1)[0])


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, nargs="*", help="made by nnflow index and nnflow calibrate")
    parser.add_argument("--growth", action="store_true", help="compare several OUT")
    parser.add_argument("--build", type=Path, metavar="SOURCE", help="time nnflow index SOURCE instead")
    parser.add_argument("--size", type=int, default=32, help="of the images built")
    parser.add_argument("--batches", type=int, default=5, help="counted, after one that is not")
    parser.add_argument("--seed", type=int, default=0, help="of queries and samples")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50, help="Euler steps of the samples")
    parser.add_argument("--tolerance", type=float, default=0.01)
    parser.add_argument("--patience", type=float, default=120.0, help="seconds for the exact field's samples")
    parser.add_argument("--memory", type=parse_bytes, default=DEFAULT_BUDGET, help="such as 4GiB")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    several = len(options.out) > 1
    if options.build is not None:
        if options.out or options.growth:
            parser.error("--build SOURCE makes an index of its own: leave out OUT and --growth")
    elif not options.out or several != options.growth:
        parser.error("wanted one OUT, or --growth and at least two, or --build SOURCE")
    if min(options.batches, options.samples, options.steps) < 1:
        parser.error("--batches, --samples and --steps: wanted at least 1 of each")
    return options


def main() -> int:
    options = parsed()
    try:
        if options.build is not None:
            figures = build(options)
            print(build_table(figures))
        elif options.growth:
            figures = growth(options)
            print(growth_table(figures))
        else:
            figures = measure(options)
            print(index_table(figures))
    except NNFlowError as error:
        print(f"bench_scale: {error}", file=sys.stderr)
        return 2
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2, default=asdict) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
