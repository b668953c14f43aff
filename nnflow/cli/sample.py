"""nnflow sample."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from nnflow.checkpoint import learned_field
from nnflow.cli.options import (
    FOLDER,
    ListType,
    SeedsType,
    chosen_decoder,
    chosen_device,
    chosen_estimator,
    class_number,
    decode_option,
    device_option,
    empirical_field,
    estimator_options,
    memory_option,
    new_folder,
)
from nnflow.errors import InputError
from nnflow.files import read_json, shown, whole_file, write_json
from nnflow.latents import pictures_of
from nnflow.plots import Column, comparison, sample_grid
from nnflow.sampling import METHODS
from nnflow.sampling import sample as integrate
from nnflow.scan import Nearest, nearest_images
from nnflow.store import ImageStore
from nnflow.velocity import HybridVelocity, Velocity

FIELDS = ("empirical", "hybrid", "learned")
_ROWS = 8  # of the comparison picture
_GRID_COLUMNS = 8


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    """One column of samples: its name in files, its heading, its images and what lies nearest."""

    slug: str
    heading: str
    images: Tensor
    nearest: Nearest


@click.command()
@click.option("--index", type=FOLDER, required=True, help="Folder of the index.")
@click.option("--run", type=FOLDER, default=None, help="Folder of the training run; for hybrid and learned.")
@click.option(
    "--field",
    "fields",
    type=ListType(click.Choice(FIELDS)),
    default="empirical",
    show_default=True,
    help="What to sample with: " + ", ".join(FIELDS) + ", or several with commas.",
)
@click.option(
    "--tau",
    "taus",
    type=ListType(click.FloatRange(0, 1)),
    default="0.2",
    show_default=True,
    help="Hybrid: empirical before tau, learned from it on. Several with commas.",
)
@click.option("--seeds", type=SeedsType(), default="0-63", show_default=True, help="One sample for each.")
@click.option(
    "--steps", type=click.IntRange(min=1), default=50, show_default=True, help="Of fixed-step methods."
)
@click.option("--method", type=click.Choice(METHODS), default="euler", show_default=True, help="ODE solver.")
@click.option("--class", "class_name", default=None, help="Sample one class, by name or number.")
@click.option("--flip", is_flag=True, help="Empirical field over mirror images too.")
@click.option("--ema/--no-ema", default=True, show_default=True, help="Averaged weights, or the last ones.")
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Samples at once.")
@click.option("--out", type=FOLDER, required=True, help="Folder for what is written.")
@decode_option
@estimator_options(default=None)
@memory_option
@device_option
def sample(
    index: Path, run: Path | None, fields: tuple[str, ...], taus: tuple[float, ...], seeds: tuple[int, ...],
    steps: int, method: str, class_name: str | None, flip: bool, ema: bool, batch: int, out: Path,
    decode: Path | None, estimator: str | None, tolerance: float, k: int, memory: int, device: str | None,
) -> None:  # fmt: skip
    """Draw samples from noise, one per seed, and find the training image nearest to each.

    Writes for each field samples-NAME.npy and grid-NAME.png, for all nearest.json and config.json, and for
    several fields comparison.png. Samples of latents are as in the source, times config.json's scaling.
    """
    where = chosen_device(device)
    store = ImageStore.open(index)
    decoder = chosen_decoder(decode, store, where)
    label = class_number(store, class_name)
    learned = None
    if set(fields) & {"hybrid", "learned"}:
        if run is None:
            raise InputError("field hybrid or learned: name the training run, --run FOLDER")
        learned = learned_field(run, store, ema=ema, device=where)
    empirical, chosen = None, None
    if set(fields) & {"empirical", "hybrid"}:
        chosen = chosen_estimator(index, estimator, k=k, tolerance=tolerance)
        empirical = empirical_field(index, chosen, flip=flip, memory=memory, device=where)
    # Of a field or a network of mirror images a mirrored copy is a copy.
    mirrored = flip or (learned is not None and learned.config is not None and learned.config.flip)
    new_folder(out)  # before the work, not after it: an OUT that cannot be written is told at once
    drawn = []
    for slug, heading, field in _columns(fields, taus, empirical, learned):
        click.echo(f"{slug}: {len(seeds)} samples", err=True)
        images = integrate(
            field, list(seeds), steps=steps, method=method, label=label, batch=batch, progress=True
        )
        nearest = nearest_images(store, images, min(2, len(store)), flip=mirrored, memory=memory)
        drawn.append(_Drawn(slug=slug, heading=heading, images=images, nearest=nearest))
    config = {
        "index": str(index), "fingerprint": store.fingerprint, "run": None if run is None else str(run),
        "fields": list(fields), "taus": list(taus) if "hybrid" in fields else [], "seeds": list(seeds),
        "scaling": None if store.codec.of_pixels else store.codec.scaling,
        "steps": steps, "method": method, "class": class_name, "flip": flip, "ema": ema,
        "mirrored": mirrored,
        **({} if chosen is None else asdict(chosen)),
    }  # fmt: skip
    shown_as = None
    if store.codec.of_pixels or decoder:
        shown_as = partial(pictures_of, store=store, decode=decoder, device=where)
    _write(out, store, drawn, seeds, config, shown_as)


def _columns(
    fields: tuple[str, ...],
    taus: tuple[float, ...],
    empirical: Velocity | None,
    learned: Velocity | None,
) -> list[tuple[str, str, Velocity]]:
    """File name, heading and field of each column, in the order asked for."""
    columns: list[tuple[str, str, Velocity]] = []
    for name in dict.fromkeys(fields):
        if name == "empirical":
            assert empirical is not None
            columns.append((name, "u* (memorised)", empirical))
        elif name == "learned":
            assert learned is not None
            columns.append((name, "u_theta (generalised)", learned))
        else:
            assert empirical is not None
            assert learned is not None
            columns += [
                (f"hybrid-{tau:g}", f"hybrid, tau = {tau:g}", HybridVelocity(empirical, learned, tau))
                for tau in dict.fromkeys(taus)
            ]
    return columns


def _write(
    out: Path,
    store: ImageStore,
    drawn: list[_Drawn],
    seeds: tuple[int, ...],
    config: dict[str, Any],
    shown_as: Callable[[Tensor], Tensor] | None,
) -> None:
    """Arrays and reports, and pictures where values can be `shown_as` such."""
    written = []
    for column in drawn:
        array, grid = out / f"samples-{column.slug}.npy", out / f"grid-{column.slug}.png"
        with whole_file(array) as place, place.open("wb") as file:
            np.save(file, column.images.numpy(), allow_pickle=False)
        written.append(array)
        if shown_as is None:
            continue
        captions = [
            f"{seed}: d = {distance:.2f}"
            for seed, distance in zip(seeds, column.nearest.distances[:, 0].tolist(), strict=True)
        ]
        sample_grid(shown_as(column.images), grid, columns=_GRID_COLUMNS, captions=captions)
        written.append(grid)
    report = {column.slug: _neighbours(store, column, seeds) for column in drawn}
    write_json(out / "nearest.json", report)
    write_json(out / "config.json", config)
    written += [out / "nearest.json", out / "config.json"]
    if len(drawn) > 1 and shown_as is not None:
        rows = slice(0, _ROWS)
        comparison(
            [
                Column(
                    name=column.heading,
                    images=shown_as(column.images[rows]),
                    nearest=shown_as(column.nearest.images(store)[rows]),
                    distances=column.nearest.distances[rows, 0],
                )
                for column in drawn
            ],
            out / "comparison.png",
            seeds=seeds[rows],
            n=len(store),
            latent=None if store.codec.of_pixels else store.shape[1:],
        )
        written.append(out / "comparison.png")
    for path in written:
        click.echo(shown(path))


def _neighbours(store: ImageStore, column: _Drawn, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """For each sample its nearest training image, and how far the two nearest are (L2 of the values).

    `mirrored`: it is the mirror image of the training image that lies so near.
    """
    rows = []
    near = column.nearest
    for seed, ids, distances, mirrored in zip(
        seeds, near.ids.tolist(), near.distances.tolist(), near.mirrored.tolist(), strict=True
    ):
        label = int(store.labels[ids[0]])
        rows.append(
            {
                "seed": seed,
                "nearest": ids[0],
                "path": shown(store.paths[ids[0]]),
                "class": shown(store.classes[label]) if label >= 0 else None,
                "mirrored": mirrored[0],
                "distance": distances[0],
                "second_distance": distances[1] if len(distances) > 1 else None,
            }
        )
    return rows


def read_samples(path: Path) -> tuple[Tensor, tuple[int, ...]]:
    """Images and seeds that `nnflow sample` wrote: a .npy file, or a folder (its learned ones).

    Raises:
        InputError: neither, or an array that is not images.
    """
    if path.is_dir():
        found = sorted(path.glob("samples-*.npy"))
        if not found:
            raise InputError(f"{shown(path)}: no samples-*.npy in it; wanted what nnflow sample wrote")
        if len(found) > 1 and path / "samples-learned.npy" not in found:
            names = ", ".join(shown(file.name) for file in found)
            raise InputError(f"{shown(path)}: holds {names}; name one of them")
        path = found[0] if len(found) == 1 else path / "samples-learned.npy"
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{shown(path)}: not a readable .npy array of samples ({shown(error)})") from error
    if not isinstance(array, np.ndarray) or array.ndim != 4 or array.dtype != np.float32:
        raise InputError(f"{shown(path)}: wanted a float32 array (S, C, H, W) as nnflow sample writes")
    seeds = config_beside(path).get("seeds", [])
    return torch.from_numpy(array), tuple(seeds) if len(seeds) == len(array) else ()


def config_beside(path: Path) -> dict[str, Any]:
    """What `nnflow sample` wrote of how it made the samples at `path`; empty where nothing is."""
    config = (path if path.is_dir() else path.parent) / "config.json"
    return read_json(config, "the configuration of nnflow sample") if config.exists() else {}
