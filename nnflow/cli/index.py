"""nnflow index and nnflow info."""

import csv
import functools
import json
import math
from pathlib import Path
from typing import Any, Literal, cast

import click

from nnflow.calibration import Calibration
from nnflow.cli.calibrate import exact_share, measure_into
from nnflow.cli.options import FOLDER, TOLERANCE, F, RankType, memory_option
from nnflow.errors import BudgetError, InputError, StoreError
from nnflow.files import shown
from nnflow.index import NeighbourIndex
from nnflow.manifest import COORDINATES, INDEX
from nnflow.memory import format_bytes, whole_memory, working_memory
from nnflow.probing import TIMES
from nnflow.store import ImageStore


class NamesType(click.ParamType):
    """Names of classes with commas between them, as in one line of CSV."""

    name = "name,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """Each name."""
        if isinstance(value, tuple):
            return value
        try:
            names = tuple(
                name.strip() for name in next(csv.reader([value], skipinitialspace=True, strict=True))
            )
        except (csv.Error, StopIteration):
            names = ()
        if not all(names) or not names:
            self.fail(f"{value!r}: wanted names of classes such as cat,dog", param, ctx)
        return names


def _of_the_whole(function: F) -> F:
    """Says what --memory would do, where what is left of it beside the libraries is too little."""

    @functools.wraps(function)
    def build(**options: Any) -> Any:
        try:
            return function(**options)
        except BudgetError as error:
            least = math.ceil(whole_memory(error.least) / 1024)
            raise InputError(f"{error} beside what the libraries take: --memory {least}KiB") from error

    return cast("F", build)


@click.command()
@click.argument("source", type=FOLDER)
@click.argument("out", type=FOLDER)
@click.option(
    "--size",
    type=click.IntRange(1, 4096),
    default=None,
    help="Side of the stored images, pixels; latents keep theirs.",
)
@click.option("--grey", is_flag=True, help="Store one channel instead of three.")
@click.option("--background", default="white", show_default=True, help="Colour under transparent pixels.")
@click.option(
    "--scaling",
    type=float,
    default=None,
    help="What latents are multiplied by; without it, what gives them unit root mean square.",
)
@click.option("--rank", type=RankType(), default="128", show_default=True, help="PCA coordinates, or pixels.")
@click.option(
    "--kind",
    default="auto",
    show_default=True,
    help="flat (exact), ivf, ivfpq, a faiss factory string, or what suits the number of images and --memory.",
)
@click.option("--workers", type=click.IntRange(min=1), default=None, help="Decoding threads; one per core.")
@click.option("--skip-unreadable", is_flag=True, help="Leave unreadable images out, listed in skipped.csv.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=None,
    help="Store N images drawn at random by --seed; those of a larger N contain them.",
)
@click.option(
    "--classes",
    type=NamesType(),
    default=None,
    help="Store only these classes, e.g. cat,dog; a name with a comma: '\"tench, Tinca tinca\",dog'.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of random choices.")
@click.option(
    "--calibration-seconds",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    help="About how long to measure the field's errors, as nnflow calibrate does with more; 0 skips it.",
)
@memory_option
@_of_the_whole
def index(
    source: Path,
    out: Path,
    size: int | None,
    grey: bool,
    background: str,
    scaling: float | None,
    rank: int | Literal["pixels"],
    kind: str,
    workers: int | None,
    skip_unreadable: bool,
    limit: int | None,
    classes: tuple[str, ...] | None,
    seed: int,
    calibration_seconds: float,
    memory: int,
) -> None:
    """Index the images of SOURCE in the folder OUT.

    SOURCE holds one folder per class, or images without classes: a folder or a zip. Or it is WebDataset
    shards (.tar), parquet tables of the Hugging Face hub, or arrays (.npz, .npy): uint8 images, or latents
    of an autoencoder as float16 or float32 (n, C, H, W), stored as they are. Several such files are given
    as their folder, or by a pattern in quotes, 'DIR/train-*'. A build that was stopped
    goes on with the same command; a finished one is reused, and measured only where it has not been.
    """
    memory = working_memory(memory)
    store = ImageStore.build(
        source,
        out,
        size=size,
        grey=grey,
        background=background,
        scaling=scaling,
        workers=workers,
        skip_unreadable=skip_unreadable,
        progress=True,
        limit=limit,
        classes=classes,
        seed=seed,
    )
    built = NeighbourIndex.build(store, out, rank=rank, kind=kind, memory=memory, seed=seed, progress=True)
    if calibration_seconds and isinstance(_calibration(built), StoreError):
        measure_into(
            built, seconds=calibration_seconds, tolerance=TOLERANCE, seed=seed, memory=_beside(built, memory)
        )
    click.echo(_told(built))


def _beside(index: NeighbourIndex, memory: int) -> int:
    """What the vectors and coordinates of an open index leave of `memory`, at least a quarter."""
    held = sum(index.manifest["files"][name]["bytes"] for name in (INDEX, COORDINATES))
    return max(memory - held, memory // 4)


@click.command()
@click.argument("out", type=FOLDER)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def info(out: Path, as_json: bool) -> None:
    """Show what the index OUT holds."""
    opened = NeighbourIndex.open(out)
    click.echo(json.dumps(_facts(opened), indent=2) if as_json else _told(opened))


def _facts(index: NeighbourIndex) -> dict[str, Any]:
    manifest = index.manifest
    labels = index.store.labels
    counts = [int((labels == label).sum()) for label in range(len(index.store.classes))]
    return {
        "folder": str(index.folder),
        "count": len(index),
        "shape": list(index.store.shape[1:]),
        "dtype": str(index.store.codec.dtype).removeprefix("torch."),
        "scaling": None if index.store.codec.of_pixels else index.store.codec.scaling,
        "classes": dict(zip(map(shown, index.store.classes), counts, strict=True)),
        "rank": manifest["rank"],
        "coordinates": manifest["coordinates"],
        "captured": manifest["captured"],
        "fitted_on": manifest["fitted_on"],
        "kind": manifest["kind"],
        "reason": manifest["reason"],
        "held": index.held.reason,
        "probing": manifest["probing"],
        "collapse_time": manifest["collapse_time"],
        "calibration": _errors_known(index),
        "bytes": {name: mark["bytes"] for name, mark in manifest["files"].items()},
        "fingerprint": index.store.fingerprint,
    }


def _calibration(index: NeighbourIndex) -> Calibration | StoreError:
    """That of an index, or why there is none."""
    try:
        return Calibration.open(index)
    except StoreError as error:
        return error


def _errors_known(index: NeighbourIndex) -> dict[str, Any] | None:
    found = _calibration(index)
    if isinstance(found, StoreError):
        return None
    return {
        "queries": min(entry.held_in.queries for entry in found.entries),
        "times": len(found.times),
        "tolerance": TOLERANCE,
        "exact_share": exact_share(found.plan(TOLERANCE)),
    }


def _calibrated(index: NeighbourIndex) -> str:
    known = _errors_known(index)
    if known is None:
        return f"no: {_calibration(index)}"
    return (
        f"{known['queries']:,} queries at {known['times']} times; tolerance {known['tolerance']:g}: "
        f"exact field for {100 * known['exact_share']:.3g} % of t"
    )


def _probed(probing: dict[str, Any]) -> str:
    if not probing:
        return ""
    return (
        f"; {probing['probes']:,} of {probing['lists']:,} lists searched, which find "
        f"{100 * probing['recall']:.4g} % of the near field from t = {TIMES[0]:g} on"
    )


def _kind(facts: dict[str, Any]) -> str:
    channels = facts["shape"][0]
    if facts["scaling"] is None:
        return "grey" if channels == 1 else "RGB"
    return f"{channels} channels of latents in {facts['dtype']}, times {facts['scaling']:.6g}"


def _told(index: NeighbourIndex) -> str:
    facts = _facts(index)
    _, height, width = facts["shape"]
    names = [f"{name} {count:,}" for name, count in facts["classes"].items()]
    classes = "none" if not names else ", ".join(names[:10]) + (" ..." if len(names) > 10 else "")
    rank = "all pixels" if facts["rank"] == "pixels" else f"{facts['coordinates']} PCA coordinates"
    sizes = ", ".join(f"{name} {format_bytes(size)}" for name, size in facts["bytes"].items())
    return "\n".join(
        [
            f"{shown(facts['folder'])}",
            f"  images         {facts['count']:,} of {height} x {width}, {_kind(facts)}",
            f"  classes        {classes}",
            f"  embedding      {rank}, {100 * facts['captured']:.1f} % of the variance, "
            f"fitted on {facts['fitted_on']:,} images",
            f"  index          {shown(facts['kind'])}: {shown(facts['reason'])}{_probed(facts['probing'])}",
            f"  held           {facts['held']}",
            f"  collapse time  t = {facts['collapse_time']:.3f} (estimated from the spectrum: beyond, "
            "u* is about one image)",
            f"  calibrated     {_calibrated(index)}",
            f"  files          {sizes}",
        ]
    )
