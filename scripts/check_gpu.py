"""Everything that a GPU changes, on a machine that has one: tests, agreement with the CPU, speed.

    scripts/check_gpu [--data OUT] [--json FILE]

Runs the tests of the fields with the fields on the GPU, compares velocities by every way to sum with those
of the CPU, on synthetic images and on those of the index OUT, and times the fields and one training step.
Prints one table in markdown. A part that fails is reported with its reason, and the others still run: then
the status is 1. Without a GPU it is 2.
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from gpu_bench import FULL, TINY, Bench, Line, pairs, placed, supports, synthetic
from gpu_speed import fields, training
from torch import Tensor

from nnflow import EmpiricalVelocity, NeighbourIndex, NNFlowError
from nnflow.faiss_backend import faiss, gpu_count
from nnflow.farfield import NearAndFar
from nnflow.files import shown
from nnflow.memory import format_bytes
from nnflow.path import interpolate
from nnflow.pixels import PixelRows
from nnflow.planned import Calibrated

ROOT = Path(__file__).resolve().parents[1]
TIMES = (0.005, 0.05, 0.15, 0.3, 0.6, 0.95)
LADDERS = ("32/30", "64/100", "32/300 64/50", "64/30 alone")
FAR_ASKED = 5e-4  # of near + far, relative to the velocity: what its tests ask of it
SAME_ASKED = 0.9  # of the queries weigh the same images; a tie in the last digit may go either way


def surroundings(bench: Bench) -> Iterator[Line]:
    """What all of it runs on."""
    name, memory, driver = platform.processor() or platform.machine(), "-", "-"
    if bench.device.type == "cuda":
        known = torch.cuda.get_device_properties(bench.device)
        name, memory, driver = known.name, format_bytes(known.total_memory), _driver()
    faiss_gpus = f"{faiss.__version__}, {gpu_count()} GPUs"
    for what, found in [
        ("device, memory", f"{name}, {memory}"),
        ("driver", driver),
        ("torch, CUDA", f"{torch.__version__}, {torch.version.cuda or '-'}"),
        ("faiss", faiss_gpus),
        ("CPU threads", str(torch.get_num_threads())),
    ]:
        yield Line("machine", what, found, "", True)


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return "nvidia-smi does not say"
    return told.splitlines()[0] if told else "nvidia-smi does not say"


def suite(bench: Bench) -> Iterator[Line]:
    """The tests of the fields, every field of theirs on the device."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *bench.sizes.tests]
    if importlib.util.find_spec("beartype") is None:
        command += ["-o", "addopts="]  # shapes go unchecked
    environment = os.environ | {"NNFLOW_TEST_DEVICE": str(bench.device)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = done.stdout.strip().splitlines() or ["no output"]
    for failed in [line for line in lines if line.startswith(("FAILED", "ERROR"))]:
        yield Line("tests", shown(failed)[:200], "failed", "passed", False)
    yield Line(
        "tests", f"pytest with fields on {bench.device}", shown(lines[-1]), "all pass", done.returncode == 0
    )


def agreement(bench: Bench) -> Iterator[Line]:
    """The velocities of the device against those of the CPU."""
    times = ", ".join(f"{t:g}" for t in TIMES)
    yield Line("agreement", "relative difference of velocities at t =", times, "", True)
    count, side = bench.sizes.images
    sets = {"synthetic": synthetic(bench, count, side, 32)}
    if bench.data is not None:
        sets["OUT"] = bench.data
    for images, index in sets.items():
        for name, make in supports(index, LADDERS).items():
            there = EmpiricalVelocity(make(PixelRows(index.store.pixels)), index.store)
            for place, here in placed(make, index, bench):
                yield _compared(f"{images}, {name}, {place}", here, there, index, bench)


def _compared(
    what: str, here: EmpiricalVelocity, there: EmpiricalVelocity, index: NeighbourIndex, bench: Bench
) -> Line:
    """Largest relative difference at each time, of the queries that weigh the same images."""
    far = isinstance(here.support, NearAndFar | Calibrated)
    found, asked, shares = [], [], []
    for number, time_ in enumerate(TIMES):
        t = torch.full((bench.sizes.queries,), time_)
        x0, x1, _ = pairs(index, len(t), number)
        x = interpolate(x0, x1, t)
        wanted, got = there.estimate(x, t), here.estimate(x.to(bench.device), t.to(bench.device))
        same = same_images(wanted.ids, got.ids.cpu())
        size = wanted.velocity.flatten(1).norm(dim=1)
        difference = (got.velocity.cpu() - wanted.velocity).flatten(1).norm(dim=1) / size
        found.append(difference[same].max().item() if bool(same.any()) else float("nan"))
        asked.append(FAR_ASKED if far else contract_asks(time_, x[0].numel()))
        shares.append(same.double().mean().item())
    fine = all(one <= most for one, most in zip(found, asked, strict=True)) and min(shares) >= SAME_ASKED
    differences = ", ".join(f"{one:.1e}" for one in found)
    limits = f"{FAR_ASKED:g}" if far else ", ".join(f"{one:.1e}" for one in asked)
    return Line("agreement", what, f"{differences}; same images {100 * min(shares):.0f} %", limits, fine)


def same_images(one: Tensor, other: Tensor) -> Tensor:
    """Which queries weigh the same images, (B,); ids (B, K), -1 for none, in any order."""
    if one.shape != other.shape:
        return torch.zeros(len(one), dtype=torch.bool)
    return (one.sort(1).values == other.sort(1).values).all(1)


def contract_asks(t: float, dim: int) -> float:
    """What tests/contract.py allows, twice because both sides round, of a velocity of length sqrt(dim)."""
    return 2 * (2e-5 + 3e-7 * dim**0.5 / (1 - t))


PARTS = (surroundings, suite, agreement, fields, training)


def checked(bench: Bench) -> Iterator[Line]:
    """All parts; one that fails is a line of its own."""
    for part in PARTS:
        print(f"{part.__name__} ...", file=sys.stderr, flush=True)
        try:
            yield from part(bench)
        except Exception as error:  # noqa: BLE001  whatever it is, the other parts are still of interest
            traceback.print_exc()
            said = shown((str(error) or type(error).__name__).strip().splitlines()[0])
            yield Line(part.__name__, "the part did not end", f"{type(error).__name__}: {said}", "", False)


def table(lines: Sequence[Line]) -> str:
    """All lines as markdown."""
    rows = [
        f"| {line.part} | {line.what} | {line.found} | {line.asked} | {'' if line.fine else 'FAILED'} |"
        for line in lines
    ]
    return "\n".join(["| part | what | found | asked | |", "|---|---|---|---|---|", *rows])


def chosen_device(name: str | None) -> torch.device:
    """The GPU, or what the script's own test names; ends the script where there is no GPU."""
    if name is not None:
        return torch.device(name)
    if not torch.cuda.is_available():
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
        print(
            f"check_gpu: torch {torch.__version__} {built} and sees no GPU; run this on a machine with an "
            "NVIDIA GPU, with a torch for CUDA",
            file=sys.stderr,
        )
        raise SystemExit(2)
    return torch.device("cuda", torch.cuda.current_device())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, metavar="OUT", help="made by nnflow index and nnflow calibrate")
    parser.add_argument("--json", type=Path, help="write the table here too")
    parser.add_argument("--device", help=argparse.SUPPRESS)  # cpu: everything small, to test the script
    options = parser.parse_args()
    device = chosen_device(options.device)
    try:
        data = None if options.data is None else NeighbourIndex.open(options.data)
    except NNFlowError as error:
        print(f"check_gpu: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        lines = list(checked(Bench(device, TINY if device.type == "cpu" else FULL, Path(folder), data)))
    print(table(lines))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(line) for line in lines], indent=2) + "\n")
    failed = sum(not line.fine for line in lines)
    print(f"\n{failed} of {len(lines)} lines failed" if failed else "\nnothing failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
