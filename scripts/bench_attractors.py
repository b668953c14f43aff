"""Which training image each way to estimate u* leads to, from the same noise.

Every trajectory of the exact field ends at a stored image. The others agree when theirs ends nearest to the
same image, or to a copy of it with the same pixels.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from bench_field import Answer, FieldAnswer, makers
from torch import Tensor

from nnflow import NeighbourIndex, nearest_images, noise_of, sample
from nnflow.memory import DEFAULT_BUDGET, parse_bytes
from nnflow.metrics import wilson_interval

SEED = 2_000_003  # of the first trajectory's noise; then + 1 each
METHODS = ("exact", "tolerance", "near-128-300", "near-512-100", "faiss-100", "faiss-1000")
LANDED = 1e-3  # L2 from a stored image: a tenth of a grey level in one pixel


def ends(method: Answer, noise: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """The stored images at the ends of all trajectories, and the time they took."""
    assert isinstance(method, FieldAnswer)
    field = method.field
    began = time.perf_counter()
    images = sample(field, noise, options.steps, batch=options.batch, progress=True)
    taken = time.perf_counter() - began
    nearest = nearest_images(field.store, images, 1)
    return {"seconds": taken, "ids": nearest.ids[:, 0], "distances": nearest.distances[:, 0]}


def same_image(index: NeighbourIndex, ids: Tensor, others: Tensor) -> Tensor:
    """Where two ids stand for the same pixels: a set may hold an image twice."""
    return (index.store.pixels[ids] == index.store.pixels[others]).all(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("index", type=Path, help="made by nnflow index and nnflow calibrate")
    parser.add_argument("--trajectories", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100, help="equal Euler steps")
    parser.add_argument("--batch", type=int, default=128, help="trajectories integrated together")
    parser.add_argument("--seed", type=int, default=SEED, help="of the first noise; then + 1 each")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=METHODS)
    parser.add_argument("--memory", type=parse_bytes, default=DEFAULT_BUDGET, help="such as 4GiB")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    index = NeighbourIndex.open(options.index)
    names = ["exact", *(name for name in options.methods if name != "exact")]
    if not set(names) <= set(METHODS):
        parser.error(f"methods {', '.join(names)}: wanted some of {', '.join(METHODS)}")
    make = makers(index, options.memory, options.device)
    noise = noise_of(range(options.seed, options.seed + options.trajectories), index.store.shape[1:])
    print(f"n = {len(index):,}, {len(noise)} trajectories of {options.steps} Euler steps")
    print(f"threads = {torch.get_num_threads()}, torch {torch.__version__}\n")
    print(
        "| method | the exact field's image | 95 % interval | on a stored image | seconds | exact / method |"
    )
    print("|---|---|---|---|---|---|")
    found, figures = {}, {}
    for name in names:
        found[name] = mine = ends(make[name](), noise, options)
        agree = int(same_image(index, mine["ids"], found["exact"]["ids"]).sum())
        low, high = wilson_interval(agree, len(noise))
        landed = (mine["distances"] < LANDED).double().mean().item()
        ratio = found["exact"]["seconds"] / mine["seconds"]
        figures[name] = {"agree": agree, "low": low, "high": high, "landed": landed, "ratio": ratio}
        figures[name] |= {"seconds": mine["seconds"], "ids": mine["ids"].tolist()}
        share = f"{agree / len(noise):.1%} | {low:.1%} to {high:.1%}"
        print(f"| {name} | {share} | {landed:.1%} | {mine['seconds']:.1f} | {ratio:.1f} |", flush=True)
    if options.json is not None:
        about = {"n": len(index), "steps": options.steps, "seed": options.seed, "batch": options.batch}
        options.json.write_text(json.dumps(about | {"methods": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
