"""Index time and memory, the speed and the errors of the exact and the nearest field.

Everything that is compared is timed in turn, A B A B, within this one process; the figures are medians of
the ratios of neighbours, because the absolute speed of a shared machine drifts.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from nnflow import EmpiricalVelocity, ImageStore, NeighbourIndex
from nnflow.memory import format_bytes, parse_bytes
from nnflow.path import interpolate


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def index_once(source: Path, out: Path, size: int) -> dict[str, Any]:
    """`nnflow index` as a process of its own: wall time and peak resident memory."""
    command = [sys.executable, "-m", "nnflow", "index", str(source), str(out), "--size", str(size)]
    command += ["--calibration-seconds", "0"]
    began = time.perf_counter()
    child = os.posix_spawn(sys.executable, command, os.environ)
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"nnflow index failed with status {status}")
    return {"seconds": time.perf_counter() - began, "peak_bytes": usage.ru_maxrss * 1024}


def peak_allocated(call: Callable[[], object]) -> int:
    """Largest sum of tensors alive at one time during `call`, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    held = peak = 0
    assert record.profiler is not None
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def paired(a: Callable[[], object], b: Callable[[], object], repeats: int) -> dict[str, float]:
    """Medians of a's and b's seconds and of the ratio a / b of neighbouring runs."""
    a(), b()
    runs = [(seconds(a), seconds(b)) for _ in range(repeats)]
    return {
        "a_seconds": statistics.median(first for first, _ in runs),
        "b_seconds": statistics.median(second for _, second in runs),
        "ratio": statistics.median(first / second for first, second in runs),
        "ratio_low": min(first / second for first, second in runs),
        "ratio_high": max(first / second for first, second in runs),
    }


def compare(
    store: ImageStore, index: NeighbourIndex, batch: int, k: int, repeats: int
) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    x1 = store.images(torch.randint(len(store), (batch,), generator=generator))
    x0 = torch.randn(x1.shape, generator=generator)
    exact = EmpiricalVelocity.exact(store, device="cpu")
    nearest = EmpiricalVelocity.nearest(index, k=k, device="cpu")
    images = store.pixels.float()
    weights = torch.rand(batch, len(store), generator=generator)
    flat = x0.flatten(1)
    logits, mean = torch.empty_like(weights), torch.empty_like(flat)

    def products() -> None:
        torch.mm(flat, images.T, out=logits)
        torch.mm(weights, images, out=mean)

    rows = []
    cases = [(f"t = {t:g}", torch.full((batch,), t)) for t in (0.05, 0.15, 0.5)]
    cases.append(("t ~ U[0, 1]", torch.rand(batch, generator=generator)))
    for name, t in cases:
        xt = interpolate(x0, x1, t)
        against = paired(products, partial(exact, xt, t), repeats)
        faster = paired(partial(exact, xt, t), partial(nearest, xt, t), repeats)
        rows.append({"times": name, "batch": batch, "gemm_over_exact": against, "exact_over_nearest": faster})
    return rows


def reference(store: ImageStore, xt: torch.Tensor, t: float) -> torch.Tensor:
    """u* in float64, by the formula and nothing else; (B, D)."""
    x = xt.flatten(1).double()
    blocks = torch.arange(len(store)).split(4096)
    squares = [torch.cdist(x, t * store.images(ids).flatten(1).double()).square() for ids in blocks]
    weights = (-torch.cat(squares, 1) / (2 * (1 - t) ** 2)).softmax(1)
    mean = torch.zeros_like(x)
    for ids in blocks:
        mean += weights[:, ids] @ store.images(ids).flatten(1).double()
    return (mean - x) / (1 - t)


def accuracy(store: ImageStore, index: NeighbourIndex, batch: int, k: int) -> list[dict[str, float]]:
    """Relative errors of both fields against float64 on path queries, and what the bound says of it."""
    generator = torch.Generator().manual_seed(1)
    x1 = store.images(torch.randint(len(store), (batch,), generator=generator))
    x0 = torch.randn(x1.shape, generator=generator)
    exact = EmpiricalVelocity.exact(store, device="cpu")
    nearest = EmpiricalVelocity.nearest(index, k=k, device="cpu")
    rows = []
    for t in (0.005, 0.02, 0.06, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 0.9, 0.99):
        xt = interpolate(x0, x1, t)
        wanted = reference(store, xt, t)
        size = wanted.norm(dim=1)
        whole, part = exact.estimate(xt, t), nearest.estimate(xt, t)
        near = (part.velocity.flatten(1) - wanted).norm(dim=1)
        rows.append(
            {
                "t": t,
                "ess": whole.ess.median().item(),
                "exact_max": ((whole.velocity.flatten(1) - wanted).norm(dim=1) / size).max().item(),
                "nearest_p50": (near / size).median().item(),
                "nearest_p90": (near / size).quantile(0.9).item(),
                "bound_p50": (part.bound / size).median().item(),
                "bound_held": (near <= part.bound + 1e-6 * size).double().mean().item(),
            }
        )
    return rows


def memory_of_exact(store: ImageStore, batch: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, *store.shape[1:], generator=generator)
    rows = []
    for budget in ("64MiB", "256MiB", "1GiB"):
        field = EmpiricalVelocity.exact(store, memory=parse_bytes(budget), device="cpu")
        field(x[:2], 0.05)
        used = peak_allocated(partial(field, x, 0.05))
        rows.append({"budget": budget, "peak_bytes": used, "answer_bytes": x.nbytes})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None, help="write the figures here too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "index"
        built = index_once(options.source, out, options.size)
        index = NeighbourIndex.open(out)
        store = index.store
        n, d = len(store), store.pixels.shape[1]
        print(f"\nn = {n:,}  d = {d:,}  threads = {torch.get_num_threads()}  torch {torch.__version__}")
        print(f"nnflow index: {built['seconds']:.1f} s, peak {format_bytes(built['peak_bytes'])}")
        rows = compare(store, index, options.batch, options.k, options.repeats)
        print(
            f"\n| {options.batch} queries at | exact s | rate of two plain products | "
            f"nearest k={options.k} s | exact / nearest |"
        )
        print("|---|---|---|---|---|")
        for row in rows:
            against, faster = row["gemm_over_exact"], row["exact_over_nearest"]
            print(
                f"| {row['times']} | {against['b_seconds']:.3f} | {100 * against['ratio']:.0f} % "
                f"({100 * against['ratio_low']:.0f} to {100 * against['ratio_high']:.0f}) | "
                f"{faster['b_seconds']:.3f} | {faster['ratio']:.1f} "
                f"({faster['ratio_low']:.1f} to {faster['ratio_high']:.1f}) |"
            )
        errors = accuracy(store, index, 64, options.k)
        print(
            f"\n| t | ESS | exact, worst of 64 | nearest k={options.k}, median | p90 | "
            "its bound, median | held |"
        )
        print("|---|---|---|---|---|---|---|")
        for line in errors:
            print(
                f"| {line['t']:g} | {line['ess']:,.1f} | {line['exact_max']:.1e} | "
                f"{line['nearest_p50']:.1e} | "
                f"{line['nearest_p90']:.1e} | {line['bound_p50']:.1e} | {100 * line['bound_held']:.0f} % |"
            )
        memory = memory_of_exact(store, options.batch)
        print("\n| exact, budget | peak of tensors | of which the answer |\n|---|---|---|")
        for line in memory:
            print(
                f"| {line['budget']} | {format_bytes(line['peak_bytes'])} | "
                f"{format_bytes(line['answer_bytes'])} |"
            )
        if options.json is not None:
            figures = {"index": built, "fields": rows, "errors": errors, "memory": memory, "n": n, "d": d}
            figures |= {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
            options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
