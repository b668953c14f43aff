"""What bench_scale measured, as markdown; computes nothing."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nnflow.memory import format_bytes
from nnflow.planning import BATCH


@dataclass(frozen=True)
class Spread:
    """Several runs of one thing."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The median of some values, and how far they lie apart."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def index_table(figures: dict[str, Any]) -> str:
    """All of `measure` as markdown."""
    errors, drawn, stream = figures["errors"], figures["samples"], figures["stream"]
    rows = [
        ("images, values of one", f"{figures['n']:,}, {figures['d']:,}"),
        ("machine", "{machine}, {cores} cores; torch {torch}, {threads} threads".format(**figures)),
        ("working memory", format_bytes(figures["memory"])),
        (f"plan for {figures['tolerance']:g}: ladder from t", figures["plan"]),
        ("opening the index and near + far, s", f"{figures['opening']:.2f}"),
        ("the exact field's pass for norms, s", f"{figures['opening_exact']:.2f}"),
    ]
    for name, costs in figures["seconds"].items():
        what = "velocities" if name == "velocity" else f"targets {name}, settled pairs unasked"
        rows.append((f"{BATCH} {what}, near + far, s", str(costs["near_and_far"])))
        rows.append((f"{BATCH} {what}, exact, s", str(costs["exact"])))
        rows.append((f"{BATCH} {what}, exact / near + far", str(costs["ratio"])))
    shares = ", ".join(f"{100 * errors[name]:.2g} %" for name in ("p50", "p90", "p99", "worst"))
    rows.append((f"relative error of {errors['queries']:,} velocities: p50, p90, p99, worst", shares))
    what = f"{drawn['samples']} samples, {drawn['steps']} Euler steps"
    same = "" if drawn["same_image"] is None else f", {drawn['same_image']} on the exact field's"
    rows.append((f"{what}, near + far, s", f"{drawn['near_and_far']:.2f}"))
    rows.append(("of these on a stored image", f"{drawn['landed']}{same}"))
    rows.append((f"{what}, exact, s", whole_time(drawn)))
    rows.append(("peak RSS: near + far alone, all of the above", memory_text(figures)))
    return "\n".join(["| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in [*rows, *stream_rows(stream)])])


def whole_time(drawn: dict[str, Any]) -> str:
    """Seconds of the exact field's samples, and how much of that was measured."""
    measured, took, calls = drawn["exact_calls"], drawn["exact_measured"], drawn["calls"]
    if measured == calls:
        return f"{took:.2f}"
    scaled = f"{measured} of {calls} calls measured in {took:.3g} s, x {calls}/{measured}"
    return f"{took * calls / measured:.3g} = {scaled}"


def memory_text(figures: dict[str, Any]) -> str:
    return f"{format_bytes(figures['rss_near_and_far'])}, {format_bytes(figures['rss'])}"


def stream_rows(stream: dict[str, float]) -> list[tuple[str, str]]:
    """How near the exact field comes to what the machine can do."""
    binding = max(("product", "read"), key=lambda name: stream[f"{name}_share"])
    taken = "{seconds:.3g} s, {passes:.3g} passes over the pixels".format(**stream)
    flop, byte = (
        [stream[f"{kind}{unit}_per_second"] / 1e9 for kind in ("", "plain_")] for unit in ("flop", "bytes")
    )
    return [
        (f"exact field, {BATCH} queries at t = {stream['t']:g}", taken),
        ("its products, plain torch.mm, GFLOP/s", f"{flop[0]:.3g}, {flop[1]:.3g}"),
        ("its pixels, plain read of the map, GB/s", f"{byte[0]:.3g}, {byte[1]:.3g}"),
        (f"what binds: the {binding}; share of it reached", f"{100 * stream[f'{binding}_share']:.0f} %"),
    ]


def growth_table(figures: dict[str, Any]) -> str:
    """One line for each index, and the power of n."""
    lines = [f"| n | {BATCH} velocities, near + far, s |", "|---|---|"]
    lines += [f"| {n:,} | {spread} |" for n, spread in zip(figures["n"], figures["seconds"], strict=True)]
    return "\n".join([*lines, "", f"time ~ n^{figures['exponent']:.2f} ({figures['threads']} threads)"])


def build_table(figures: dict[str, Any]) -> str:
    """Seconds and memory of a build."""
    peak = f"peak RSS, --memory {format_bytes(figures['memory'])}"
    lines = ["| nnflow index | |", "|---|---|"]
    lines += [f"| {name}, by its bar, s | {taken:.0f} |" for name, taken in figures["stages"].items()]
    lines += [f"| total, s | {figures['seconds']:.1f} |", f"| {peak} | {format_bytes(figures['rss'])} |"]
    return "\n".join(lines)
