"""Error and cost of every way to estimate u*, on the same queries, in one process.

Errors are relative, |u - u*| / |u*|, against the exact field in float32, itself checked against float64.
Queries lie on the paths of stored images, from seeds of their own. Everything is timed in turn,
A B C A B C; the figures are medians over the rounds, ratios those of neighbours in a round.
"""

import argparse
import json
import platform
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from baselines import Baseline, Deann, Draws, Halves, Scan, Snis, Top
from bench_main import paired, peak_allocated, reference, seconds
from field_figures import Row, cost_against_error, error_against_time
from torch import Tensor

from nnflow import EmpiricalVelocity, ImageStore, NeighbourIndex
from nnflow.memory import DEFAULT_BUDGET, format_bytes, parse_bytes
from nnflow.path import interpolate

TIMES = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25, 0.3, 0.5, 0.9, 0.99)
SEED = 1_000_003  # of the first time's queries; the default calibration's stay below 10^6
OF_X1 = "efm-1000"
PRODUCT_BYTES = 1 << 30  # images held as float32 by the plain products; more are scaled up to
MEMORY_TIME = 0.05  # at which peak memory is taken: most images weigh there

Queries: TypeAlias = tuple[Tensor, Tensor, Tensor]  # x (B, C, H, W), t (B,), id of x1 (B,)
Answer: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class FieldAnswer:
    """A field of nnflow's, asked as the baselines are."""

    field: EmpiricalVelocity

    def __call__(self, x: Tensor, t: Tensor, own: Tensor) -> Tensor:  # noqa: ARG002
        """Velocity; which images the paths end at is not looked at."""
        return self.field(x, t)


def makers(index: NeighbourIndex, memory: int, device: str) -> dict[str, Callable[[], Answer]]:
    """What can be measured, by the name that --methods takes; built when called."""
    scans: list[Scan] = []

    def scan() -> Scan:
        if not scans:
            scans.append(Scan(index.store, memory=memory, device=device))
        return scans[0]

    def other(kind: Callable[..., Baseline], **settings: Any) -> Callable[[], Answer]:
        return lambda: kind(scan(), **settings)

    def own(kind: Callable[..., EmpiricalVelocity], *source: Any, **settings: Any) -> Callable[[], Answer]:
        return lambda: FieldAnswer(kind(*source, **settings, memory=memory, device=device))

    nearest, far = EmpiricalVelocity.nearest, EmpiricalVelocity.near_and_far
    return {
        "exact": own(EmpiricalVelocity.exact, index.store),
        "exact-halves": other(Halves),
        "top-100": other(Top, k=100),
        "top-1000": other(Top, k=1000),
        "faiss-100": own(nearest, index, k=100),
        "faiss-1000": own(nearest, index, k=1000),
        OF_X1: other(Draws, draws=1000, seed=0),
        "efm-1000-no-x1": other(Draws, draws=1000, seed=0, with_own=False),
        "deann": other(Deann, k=1000, draws=4000, seed=0, index=index),
        "deann-scan": other(Deann, k=1000, draws=4000, seed=0),
        "snis-256": other(Snis, k=2048, draws=256, seed=0),
        "snis-2048": other(Snis, k=2048, draws=2048, seed=0),
        "near-64-100": own(far, index, rank=64, k=100),
        "near-128-300": own(far, index, rank=128, k=300),
        "near-512-100": own(far, index, rank=512, k=100),
        "ladder": own(far, index, levels=[(64, 3000), (512, 100)]),
        "tolerance": own(far, index, tolerance=0.01),
    }


def path_queries(store: ImageStore, count: int, t: Tensor, seed: int, device: str) -> Queries:
    """Points on the paths from noise to `count` images of `store`, at times `t`."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randint(len(store), (count,), generator=generator)
    x1 = store.images(own)
    x0 = torch.randn(x1.shape, generator=generator)
    return interpolate(x0, x1, t).to(device), t.to(device), own.to(device)


def batches(queries: Queries, size: int) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(part.split(size) for part in queries), strict=True)


def answers(method: Answer, queries: Queries, size: int) -> Tensor:
    """The method on all queries, batch by batch."""
    found = torch.cat([method(*some) for some in batches(queries, size)])
    if found.is_cuda:
        torch.cuda.synchronize()
    return found


def relative(found: Tensor, wanted: Tensor) -> Tensor:
    return (found - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)


class Products:
    """The two matrix products of the exact sum and nothing else, on pixels held as float32."""

    def __init__(self, index: NeighbourIndex, batch: int, device: str) -> None:
        pixels = index.store.pixels
        held = min(len(pixels), PRODUCT_BYTES // (4 * pixels.shape[1]))
        self.batch, self.scale = batch, len(pixels) / held
        self.images = pixels[:held].to(device).float()
        self.x = torch.randn(batch, pixels.shape[1], device=device)
        self.weights = torch.empty(batch, held, device=device)

    def __call__(self) -> None:
        """One batch of queries, the images held."""
        torch.mm(self.x, self.images.T, out=self.weights)
        torch.mm(self.weights, self.images, out=self.x)
        self.x.div_(self.x.norm())  # the same numbers again and again would overflow
        if self.x.is_cuda:
            torch.cuda.synchronize()

    def seconds(self, queries: int) -> float:
        """For all images and `queries` queries, from one run."""
        return seconds(self) * self.scale * queries / self.batch


def measure(methods: dict[str, Answer], queries: Queries, products: Products, repeats: int) -> Iterator[Row]:
    """Errors and times of all methods at one time."""
    count, size, t = len(queries[0]), products.batch, float(queries[1][0])
    wanted = answers(methods["exact"], queries, size)
    errors = {name: relative(answers(method, queries, size), wanted) for name, method in methods.items()}
    products()
    taken: dict[str, list[float]] = {name: [] for name in methods}
    ratios: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeats):
        plain = products.seconds(count)
        for name, method in methods.items():
            taken[name].append(seconds(partial(answers, method, queries, size)))
            ratios[name].append(taken[name][-1] / plain)
    for name, error in errors.items():
        p50, p90, p99 = error.double().quantile(error.new_tensor([0.5, 0.9, 0.99]).double()).tolist()
        cost = 1000 / count * statistics.median(taken[name])
        yield Row(name, round(t, 6), p50, p90, p99, cost, statistics.median(ratios[name]))


def mean_cost(
    methods: dict[str, Answer], index: NeighbourIndex, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Each method against the exact field on one batch with t ~ U[0, 1], neighbours in time."""
    batch, seed = options.batch, options.seed - 2
    t = torch.rand(batch, generator=torch.Generator().manual_seed(seed))
    queries = path_queries(index.store, batch, t, seed, options.device)
    exact = partial(answers, methods["exact"], queries, batch)
    return {
        name: paired(exact, partial(answers, method, queries, batch), options.repeats)
        for name, method in methods.items()
    }


def chosen_ladder(method: Answer, queries: Queries) -> tuple[str, float]:
    """What `tolerance=0.01` takes at the time of `queries`, and the error that was calibrated for it."""
    assert isinstance(method, FieldAnswer)
    estimate = method.field.estimate(queries[0], queries[1])
    return Counter(estimate.ladder).most_common(1)[0][0], estimate.error.max().item()


def peak_bytes(method: Answer, queries: Queries) -> int:
    """Largest sum of the tensors alive at one time while the method answers, beside what it holds."""
    if not queries[0].is_cuda:
        return peak_allocated(partial(method, *queries))
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    method(*queries)
    return torch.cuda.max_memory_allocated() - held


def against_float64(exact: Answer, index: NeighbourIndex, options: argparse.Namespace) -> float:
    """Worst relative error of the exact field itself, over 4 queries at each of three times."""
    worst, times = 0.0, options.times
    for t in (times[0], times[len(times) // 2], times[-1]):
        queries = path_queries(index.store, 4, torch.full((4,), t), options.seed - 3, options.device)
        wanted = reference(index.store, queries[0].cpu(), t)
        worst = max(worst, relative(exact(*queries).flatten(1).cpu().double(), wanted).max().item())
    return worst


def table(rows: Sequence[Row], quantity: str, form: Callable[[float], str]) -> str:
    """One quantity, a line for each method, a column for each time."""
    times = sorted({row.t for row in rows})
    names = list(dict.fromkeys(row.method for row in rows))
    value = {(row.method, row.t): form(getattr(row, quantity)) for row in rows}
    lines = ["| method | " + " | ".join(f"{t:g}" for t in times) + " |", "|---" * (1 + len(times)) + "|"]
    lines += [f"| {name} | " + " | ".join(value[name, t] for t in times) + " |" for name in names]
    return "\n".join(lines)


def percent(value: float) -> str:
    """Two digits; what is below a millionth of the velocity is rounding."""
    return "0" if value < 1e-6 else f"{100 * value:.2g} %"


def show(figures: dict[str, Any], rows: Sequence[Row]) -> None:
    """Everything as markdown."""
    for quantity, what in (("p50", "median"), ("p90", "90th percentile"), ("p99", "99th percentile")):
        print(f"\nRelative velocity error, {what}, against t\n\n{table(rows, quantity, percent)}")
    print(f"\nSeconds per 1,000 queries, against t\n\n{table(rows, 'seconds', '{:.3g}'.format)}")
    print(f"\nTime against two plain matrix products\n\n{table(rows, 'ratio', '{:.3f}'.format)}")
    print(f"\n{figures['batch']} queries, t ~ U[0, 1]; peak of the tensors of one batch; worst error\n")
    print("| method | seconds | exact / method | peak | worst p99 | at t |")
    print("|---|---|---|---|---|---|")
    for name, peak in figures["peak_bytes"].items():
        worst = max((row for row in rows if row.method == name), key=lambda row: row.p99)
        cost = figures["uniform"][name]
        taken = f"{cost['b_seconds']:.4f}"
        ratio = f"{cost['ratio']:.1f} ({cost['ratio_low']:.1f} to {cost['ratio_high']:.1f})"
        print(f"| {name} | {taken} | {ratio} | {format_bytes(peak)} | {percent(worst.p99)} | {worst.t:g} |")
    if figures["ladders"]:
        print("\n| t | tolerance=0.01 takes | calibrated p99 | p99 here |\n|---|---|---|---|")
    here = {row.t: row.p99 for row in rows if row.method == "tolerance"}
    for t, (ladder, expected) in figures["ladders"].items():
        print(f"| {t:g} | {ladder} | {percent(expected)} | {percent(here[t])} |")
    print(f"\nThe exact field against float64, worst: {figures['exact_against_float64']:.1e}")


def run(options: argparse.Namespace, index: NeighbourIndex) -> tuple[dict[str, Any], list[Row]]:
    """All measurements."""
    make = makers(index, options.memory, options.device)
    names = ["exact", *(name for name in options.methods or make if name != "exact")]
    methods = {name: make[name]() for name in names}
    products = Products(index, options.batch, options.device)
    store = index.store if options.held_out is None else ImageStore.open(options.held_out)
    rows: list[Row] = []
    ladders = {}
    for number, t in enumerate(options.times):
        times = torch.full((options.queries,), t)
        queries = path_queries(store, options.queries, times, options.seed + number, options.device)
        rows += measure(methods, queries, products, options.repeats)
        if "tolerance" in methods:
            ladders[rows[-1].t] = chosen_ladder(methods["tolerance"], queries)
        print(f"t = {t:g} done", file=sys.stderr, flush=True)
    times = torch.full((options.batch,), MEMORY_TIME)
    queries = path_queries(index.store, options.batch, times, options.seed - 1, options.device)
    figures = {
        "n": len(index),
        "d": index.store.pixels.shape[1],
        "device": options.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "queries": options.queries,
        "held_out": None if options.held_out is None else store.fingerprint,
        "batch": options.batch,
        "ladders": ladders,
        "peak_bytes": {name: peak_bytes(method, queries) for name, method in methods.items()},
        "uniform": mean_cost(methods, index, options),
        "exact_against_float64": against_float64(methods["exact"], index, options),
    }
    return figures, rows


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("index", type=Path, help="made by nnflow index and nnflow calibrate")
    parser.add_argument("--queries", type=int, default=256, help="at each time")
    parser.add_argument("--times", type=numbers, default=list(TIMES), help="such as .04,.1,.2")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of timing")
    parser.add_argument("--seed", type=int, default=SEED, help="of the first time's queries; then + 1 each")
    parser.add_argument("--methods", type=lambda text: text.split(","), help="some of them; default: all")
    parser.add_argument("--held-out", type=Path, help="errors on the paths to this index's images instead")
    parser.add_argument("--batch", type=int, default=128, help="queries asked together")
    parser.add_argument("--memory", type=parse_bytes, default=DEFAULT_BUDGET, help="such as 4GiB")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--plot", type=Path, help="PNG; two are written, NAME-cost.png and NAME-error.png")
    options = parser.parse_args()
    index = NeighbourIndex.open(options.index)
    unknown = set(options.methods or ()) - set(makers(index, options.memory, options.device))
    if unknown:
        parser.error(
            f"unknown methods {', '.join(sorted(unknown))}: wanted some of "
            f"{', '.join(makers(index, options.memory, options.device))}"
        )
    if options.held_out is not None and OF_X1 in (options.methods or [OF_X1]):
        parser.error(f"--held-out: {OF_X1} draws with x1, a stored image; name other --methods")
    figures, rows = run(options, index)
    size = f"n = {figures['n']:,}, d = {figures['d']:,}"
    print(f"\n{size}, threads = {figures['threads']}, torch {torch.__version__}")
    show(figures, rows)
    if options.json is not None:
        options.json.write_text(
            json.dumps(figures | {"rows": [asdict(row) for row in rows]}, indent=2) + "\n"
        )
    if options.plot is not None:
        paths = "stored images" if options.held_out is None else "images held out"
        about = f"{size}; {options.queries} queries on the paths of {paths} at each time"
        for name, draw in (("cost", cost_against_error), ("error", error_against_time)):
            draw(rows, options.plot.with_name(f"{options.plot.stem}-{name}.png"), about)


if __name__ == "__main__":
    main()
