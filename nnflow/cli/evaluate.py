"""nnflow evaluate."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from nnflow.checkpoint import learned_field
from nnflow.cli.options import (
    FOLDER,
    chosen_device,
    chosen_estimator,
    chosen_extractor,
    device_option,
    empirical_field,
    estimator_options,
    memory_option,
    new_folder,
)
from nnflow.cli.sample import config_beside, read_samples
from nnflow.errors import InputError
from nnflow.evaluation import Evaluation
from nnflow.evaluation import evaluate as measure
from nnflow.files import shown, write_json
from nnflow.metrics import MemorisedFraction
from nnflow.plots import distance_histogram, error_over_time
from nnflow.quality import ImageQuality
from nnflow.store import ImageStore


@click.command()
@click.option("--index", type=FOLDER, required=True, help="Folder of the index of the training images.")
@click.option(
    "--samples", type=FOLDER, default=None, help="samples-*.npy, or the folder nnflow sample wrote."
)
@click.option("--run", type=FOLDER, default=None, help="Training run whose u_theta is held against u*.")
@click.option("--held-out", type=FOLDER, default=None, help="Index of images not trained on: the null.")
@click.option("--pairs", type=click.IntRange(min=1), default=256, show_default=True, help="For the error.")
@click.option(
    "--features",
    multiple=True,
    metavar="NAME",
    help="Compare samples, held-out and training images in pixels, pca, pca:64, classifier:DIR (see nnflow "
    "classifier) or torchscript:FILE (Inception-V3, DINOv2 ...); may be given several times.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of pairs and of subsets."
)
@click.option("--out", type=FOLDER, required=True, help="Folder for what is written.")
@estimator_options(default="exact")
@memory_option
@device_option
def evaluate(
    index: Path, samples: Path | None, run: Path | None, held_out: Path | None, pairs: int,
    features: tuple[str, ...], seed: int, out: Path, estimator: str, tolerance: float, k: int, memory: int,
    device: str | None,
) -> None:  # fmt: skip
    """Measure memorisation of samples and the error of a network against u*.

    A sample counts as memorised when it is three times nearer to one training image than to any other; of
    what was trained or sampled with flips, to that image or its mirror image. Copies of an image stored
    twice need not count: how many equal an image in every byte is said where that is more.
    With --features, Frechet distance (FID in these features), KID, precision and recall of samples against
    training and held-out images, and of as many held-out images against the training images, the null.
    Writes evaluation.json, distances.png (with --samples or --held-out) and error.png (with --run).
    """
    if samples is None and run is None and held_out is None:
        raise InputError("nothing to evaluate: name --samples, --run or --held-out")
    if features and samples is None and held_out is None:
        raise InputError("--features compares images: name --samples or --held-out")
    where = chosen_device(device)
    store = ImageStore.open(index)
    images, seeds = (None, ()) if samples is None else read_samples(samples)
    extractors = [chosen_extractor(name, index, store, where) for name in features]
    learned = field = None
    flip = samples is not None and _mirrored(samples, index, store)
    chosen = chosen_estimator(index, estimator, k=k, tolerance=tolerance)
    if run is not None:
        learned = learned_field(run, store, ema=True, device=where)
        # A network trained with flips regresses on the field of the flipped images too.
        trained = learned.config is not None and learned.config.flip
        field = empirical_field(index, chosen, flip=trained, memory=memory, device=where)
        flip |= trained
    new_folder(out)  # before the work, not after it: an OUT that cannot be written is told at once
    result = measure(
        store,
        samples=images,
        held_out=None if held_out is None else ImageStore.open(held_out),
        learned=learned,
        field=field,
        flip=flip,
        pairs=pairs,
        seed=seed,
        sample_seeds=seeds,
        extractors=extractors,
        conditional=learned is not None and learned.classes > 0,
        device=where if learned is not None else None,
        memory=memory,
        progress=True,
    )
    config: dict[str, Any] = {
        "index": str(index), "samples": None if samples is None else str(samples),
        "run": None if run is None else str(run), "held_out": None if held_out is None else str(held_out),
        "features": list(features),
        **dataclasses.asdict(chosen),
    }  # fmt: skip
    _write(out, result, config)


def _mirrored(samples: Path, index: Path, store: ImageStore) -> bool:
    """Whether mirrored copies are copies to the makers of `samples`; notes that these knew other images."""
    made = config_beside(samples)
    if made.get("fingerprint", store.fingerprint) != store.fingerprint:
        note = f"{shown(samples)} was drawn beside other images than {shown(index)}'s"
        click.echo(f"nnflow: note: {note}", err=True)
    # Samples made before that was looked at only say whether u* was mirrored.
    return bool(made.get("mirrored", made.get("flip", False)))


def _write(out: Path, result: Evaluation, config: dict[str, Any]) -> None:
    write_json(out / "evaluation.json", result.to_dict() | {"config": config})
    written = [out / "evaluation.json"]
    if result.samples is not None or result.held_out is not None:
        distance_histogram(result, out / "distances.png")
        written.append(out / "distances.png")
    if result.error is not None:
        error_over_time(result, out / "error.png")
        written.append(out / "error.png")
    for name in ("samples", "held_out"):
        near = getattr(result, name)
        if near is not None:
            copies = f"; {near.copies} equal in every byte" if near.copies > near.memorised.memorised else ""
            mirrored = ", mirror images counted" if result.flip else ""
            click.echo(f"{name.replace('_', '-')}: {_in_words(near.memorised)}{mirrored}{copies}")
    for found in result.quality:
        _tell(found)
    if result.error is not None:
        worst, when = max(zip(result.error.mean_squared, result.error.times, strict=True))
        click.echo(f"u_theta against u*: mean squared error per value at most {worst:.3g}, at t = {when:g}")
    for path in written:
        click.echo(shown(path))


def _in_words(memorised: MemorisedFraction) -> str:
    values = dataclasses.asdict(memorised)
    return (
        f"{values['memorised']} of {values['images']} memorised, {100 * values['fraction']:.1f} % "
        f"(95 % interval {100 * values['low']:.1f} to {100 * values['high']:.1f} %)"
    )


def _tell(found: ImageQuality) -> None:
    """One line for each comparison under one extractor."""
    name = f"{found.extractor['name']} ({found.extractor['features']} features)"
    pairs = (
        ("samples against training images", found.to_training),
        ("samples against held-out images", found.to_held_out),
        ("held-out against training images", found.null),
    )
    for what, quality in pairs:
        if quality is not None:
            frechet, both = quality.frechet, quality.precision_recall
            error = "" if frechet.standard_error is None else f" +- {frechet.standard_error:.2g}"
            click.echo(
                f"{name}, {frechet.count} {what}: Frechet {frechet.value:.4g}{error}, "
                f"KID {quality.kernel.value:.3g}, precision {both.precision:.3f}, recall {both.recall:.3f}"
            )
