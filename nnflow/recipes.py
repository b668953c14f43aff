"""What a build of images.h5 is asked for, and whether what lies in a folder is that."""

import dataclasses
from pathlib import Path
from typing import Any

from nnflow import hdf5file
from nnflow.decode import Decoder
from nnflow.errors import InputError, SourceError, StoreError
from nnflow.files import shown
from nnflow.hdf5file import RMS, SCALINGS, Recipe
from nnflow.sources import Source

SKIPPED = "skipped.csv"


def recipe_of(source: Source, decoder: Decoder | None, *, grey: bool, scaling: float | None) -> Recipe:
    """What is to be built of `source`.

    Raises:
        InputError: what suits only pixels asked of latents, or the other way round.
    """
    named: dict[str, Any] = {"source": source.digest, "listed": len(source.items)}
    latents = source.latents
    if latents is None:
        if decoder is None:
            raise InputError("no size: wanted the height and width of the stored images (--size), in pixels")
        if scaling is not None:
            raise InputError(f"scaling {scaling:g}: it is for latents (float arrays), and these are pixels")
        return Recipe(**named, **dataclasses.asdict(decoder))
    if grey or (decoder is not None and (decoder.size,) * 2 != latents.shape[1:]):
        raise InputError(
            f"latents of (C, H, W) = {latents.shape} are stored as they are: leave out size and grey"
        )
    if scaling is not None and not SCALINGS[0] <= scaling <= SCALINGS[1]:
        raise InputError(f"scaling {scaling:g}: wanted {SCALINGS[0]:g} to {SCALINGS[1]:g}")
    return Recipe(**named, scaling=RMS if scaling is None else float(scaling))


def refuse_unless_of(path: Path, recipe: Recipe, *, skip_unreadable: bool) -> None:
    """Refuses the finished file at `path` unless it is what `recipe` would build."""
    header = hdf5file.read_header(path)
    if not header.fingerprint:
        raise StoreError(f"{shown(path)}: unfinished, under a finished name; remove it")
    refuse_other(path.parent, header.recipe, recipe)
    missing = recipe.listed - header.shape[0]
    if missing and not skip_unreadable:
        raise SourceError(
            f"{shown(path)}: built without {missing} unreadable images, listed in {SKIPPED}; "
            "pass --skip-unreadable to use it so"
        )


def refuse_other(out: Path, there: Recipe, asked: Recipe) -> None:
    """Refuses what lies in `out`, built as `there` says, unless that is what is `asked` for."""
    for name in ("size", "grey", "background", "scaling", "listed", "source"):
        old, new = getattr(there, name), getattr(asked, name)
        if old != new:
            what = {"listed": "source: images", "source": "source: digest of its listing"}
            raise StoreError(
                f"{shown(out)}: built with another {what.get(name, name)} {shown(old)}, asked for "
                f"{shown(new)}; name another OUT, or remove this one"
            )
