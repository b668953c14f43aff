"""`targets`: networks that differ in their regression target alone, side by side, with several seeds.

Networks of one seed share the weights they begin with, images, noise and times of every batch. So their
differences are taken seed by seed (`paired`), against the first target named. Quality is the Frechet
distance of samples of one noise to the training images and to held-out ones, at several steps of the
training. How noisy a target is, and the gradient it gives, is measured at the weights of one network for all
(`noise`): otherwise the weights would be compared.
"""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from nnflow.config import TrainConfig, knob
from nnflow.errors import InputError
from nnflow.evaluation import evaluate
from nnflow.features import FeatureExtractor
from nnflow.figures.compared import Compared, extractors, joined
from nnflow.figures.drawn.targets import draw
from nnflow.figures.experiment import Document, Experiment, facts
from nnflow.figures.inputs import Inputs, weights_fingerprint
from nnflow.figures.networks import TrainingSettings, nearness_key, trained
from nnflow.figures.parts import Parts
from nnflow.figures.pictures import to_text
from nnflow.files import shown
from nnflow.frechet import frechet_distance
from nnflow.metrics import memorised_fraction
from nnflow.noise import target_noise
from nnflow.quality import FeatureSet, feature_set
from nnflow.sampling import sample
from nnflow.store import ImageStore
from nnflow.targets import TARGETS
from nnflow.training import matcher_of, run_record
from nnflow.unet import LearnedVelocity

NAMES = "cfm,otcfm,efm-128,efm-256,efm-1000,efm,efm-unbiased"
_TIMES = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.98)


@dataclass(frozen=True, kw_only=True)
class TargetSettings(TrainingSettings):
    """Targets, seeds, and what is measured of each network."""

    targets: str = knob(NAMES, "the targets, efm-M with M images; differences are against the first")
    seeds: tuple[int, ...] = knob((0, 1, 2), "of the networks, one each for every target", low=0)
    points: int = knob(4, "steps at which quality is measured, each a checkpoint kept", low=1, high=100)
    samples: int = knob(1_000, "samples of each network, of noise seeds 0, 1, ...", low=20)
    sample_steps: int = knob(30, "Euler steps of a sample", low=1)
    classifier_steps: int = knob(600, "of the classifier whose features are compared; 0 for none", low=0)
    pairs: int = knob(256, "pairs of noise and image, for the error", low=1)
    noise_batch: int = knob(64, "images of a gradient whose variance is measured", low=1)
    noise_draws: int = knob(4, "redraws of a target at one x_t", low=2)
    noise_batches: int = knob(8, "batches at each time", low=2)
    times: tuple[float, ...] = knob(_TIMES, "at which noise is measured", low=0.0, high=0.999)
    shown: int = knob(8, "samples in the picture", low=1, high=16)

    def configs(self) -> dict[str, TrainConfig]:
        """Of each target named, with the first seed.

        Raises:
            InputError: a name that is no target, twice the same, or none.
        """
        names = [name.strip() for name in self.targets.split(",") if name.strip()]
        if not names or len(set(names)) < len(names):
            raise InputError(f"targets {shown(self.targets)!r}: wanted names, each once, such as {NAMES}")
        return {name: self.config_of(name, self.seeds[0]) for name in names}

    def config_of(self, name: str, seed: int) -> TrainConfig:
        """The config of one target and seed."""
        kind, _, count = name.rpartition("-")
        if kind == "efm" and count.isdecimal() and int(count) > 0:
            return self.training("efm-m", seed, samples=int(count), keep=self.points)
        if name == "efm-m" or name not in TARGETS:
            raise InputError(f"target {shown(name)!r}: wanted some of {NAMES}")
        return self.training(name, seed, keep=self.points)


@dataclass(frozen=True, kw_only=True)
class Targets:
    """All networks, what is joined over their seeds, and the null.

    Attributes:
        targets: `compared.joined` of each.
        null: Frechet distance of held-out images to the training images, by extractor; as many as there
            are samples, where there are so many.
        parameters: of a network.
        step: of the last point.
        missing: what could not be had.
    """

    targets: tuple[dict[str, Any], ...]
    null: dict[str, Any]
    parameters: int
    step: int
    missing: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it."""
        return {
            "targets": list(self.targets),
            "null": self.null,
            "parameters": self.parameters,
            "step": self.step,
        }


def measure(settings: TargetSettings, inputs: Inputs, parts: Parts) -> Targets:
    """Trains a network for each target and seed, and measures what they are and how noisy the targets."""
    names = list(settings.configs())  # a wrong name is told before the first training
    used, missing = extractors(inputs, parts, steps=settings.classifier_steps)
    if len(settings.seeds) < 2:
        missing.append("one seed: no spread and no interval; name at least two --seeds")
    study = _Study(settings, inputs, parts, used)
    networks = {name: [study.network(name, seed) for seed in settings.seeds] for name in names}
    noise = [study.noise(names, seed) for seed in settings.seeds]
    found = [
        Compared(name=name, networks=networks[name], noise=[of_seed[name] for of_seed in noise])
        for name in names
    ]
    return Targets(
        targets=tuple(joined(found)),
        null=study.null(),
        parameters=found[0].networks[0]["parameters"],
        step=found[0].networks[0]["points"][-1]["step"],
        missing=tuple(missing),
    )


class _Study:
    """What all networks are measured by."""

    def __init__(
        self,
        settings: TargetSettings,
        inputs: Inputs,
        parts: Parts,
        used: dict[str, FeatureExtractor],
    ) -> None:
        self.settings, self.inputs, self.parts, self.extractors = settings, inputs, parts, used
        self._read: dict[tuple[str, str], FeatureSet] = {}

    def run(self, name: str, seed: int) -> Path:
        """The trained network of one target and seed."""
        config = self.settings.config_of(name, seed)
        part = f"run-{name}-seed-{seed}"
        return trained(part, self.inputs.opened, config, self.parts, progress=self.inputs.progress)

    def network(self, name: str, seed: int) -> dict[str, Any]:
        """Everything about one network, measured once."""
        run, settings = self.run(name, seed), self.settings
        asked = ("samples", "sample_steps", "points", "pairs", "shown")
        key = {
            "weights": weights_fingerprint(run),
            "held_out": self.held_out_key,
            "extractors": {called: extractor.identity for called, extractor in self.extractors.items()},
            **{knob: getattr(settings, knob) for knob in asked},
            **nearness_key(flip=settings.config_of(name, seed).flip),
        }
        measured = partial(self._measured, run, settings.config_of(name, seed))
        return self.parts.get(f"network-{name}-seed-{seed}", key, measured)

    @property
    def held_out_key(self) -> str | None:
        """Which held-out images, if any."""
        return None if self.inputs.held_out is None else self.inputs.held_out_store.fingerprint

    def _measured(self, run: Path, config: TrainConfig) -> dict[str, Any]:
        inputs, settings = self.inputs, self.settings
        every = max(1, config.steps // settings.points)
        points = []
        for checkpoint in sorted((run / "checkpoints").glob("step-*")):
            step = int(checkpoint.name.removeprefix("step-"))
            if step and (step % every == 0 or step == config.steps):
                learned = LearnedVelocity.open(checkpoint, device=inputs.where)
                images = sample(learned, list(range(settings.samples)), settings.sample_steps)
                points.append({"step": step, "frechet": self._distances(images)})
        found = evaluate(
            inputs.store,
            held_out=None if inputs.held_out is None else inputs.held_out_store,
            learned=learned,
            field=inputs.field(flip=config.flip),
            pairs=settings.pairs,
        ).to_dict()
        return {
            "points": points,
            "parameters": sum(weight.numel() for weight in learned.parameters()),
            "memorised": asdict(memorised_fraction(images, inputs.opened, flip=config.flip)),
            "error": found["error"],
            "held_out_error": found["held_out_error"],
            "samples": to_text(images[: settings.shown]),
        }

    def _distances(self, images: Tensor) -> dict[str, dict[str, Any]]:
        """Frechet distances of samples, by extractor and reference."""
        found: dict[str, dict[str, Any]] = {}
        for called, extractor in self.extractors.items():
            ours = feature_set(extractor, images, memory=self.inputs.memory)
            found[called] = {
                name: asdict(frechet_distance(ours.groups, self._reference(called, name).moments))
                for name in self._stores()
            }
        return found

    def _stores(self) -> dict[str, ImageStore]:
        held_out = {} if self.inputs.held_out is None else {"held-out": self.inputs.held_out_store}
        return {"training": self.inputs.store, **held_out}

    def _reference(self, called: str, name: str) -> FeatureSet:
        """Training or held-out images under one extractor, read once."""
        if (called, name) not in self._read:
            images = self._stores()[name]
            self._read[called, name] = feature_set(self.extractors[called], images, memory=self.inputs.memory)
        return self._read[called, name]

    def noise(self, names: list[str], seed: int) -> dict[str, Any]:
        """`noise.target_noise` of all targets at the weights of the first one's network of this seed."""
        settings, index = self.settings, self.inputs.opened
        run = self.run(names[0], seed)
        configs = {name: settings.config_of(name, seed) for name in names}
        asked = ("noise_batch", "noise_draws", "noise_batches", "times")
        key = {
            "weights": weights_fingerprint(run),
            "records": {name: run_record(index, config).index for name, config in configs.items()},
            "samples": {name: config.samples for name, config in configs.items()},
            **{knob: getattr(settings, knob) for knob in asked},
        }

        def measured() -> dict[str, Any]:
            place = self.inputs.where
            found = target_noise(
                LearnedVelocity.open(run, device=place),
                index.store,
                {name: matcher_of(index, config, place) for name, config in configs.items()},
                times=settings.times,
                batch=settings.noise_batch,
                draws=settings.noise_draws,
                batches=settings.noise_batches,
                seed=seed,
                flip=configs[names[0]].flip,
                memory=self.inputs.memory,
            )
            return {name: asdict(noise) for name, noise in found.items()}

        return self.parts.get(f"noise-seed-{seed}", key, measured)

    def null(self) -> dict[str, Any]:
        """Frechet distance of held-out images to the training images, by extractor."""
        if self.inputs.held_out is None:
            return {}
        held_out = self.inputs.held_out_store
        count = min(len(held_out), self.settings.samples)
        found = {}
        for called, extractor in self.extractors.items():
            theirs = feature_set(extractor, held_out, count=count, memory=self.inputs.memory)
            reference = self._reference(called, "training").moments
            found[called] = asdict(frechet_distance(theirs.groups, reference))
        return found


def caption(document: Document) -> str:
    """What is seen, the differences at the last step, and what it was made of."""
    settings, results = document.settings, document.results
    seeds = ", ".join(map(str, settings["seeds"]))
    first = results["targets"][0]["name"]
    told = [
        f"Networks of {results['parameters']:,} parameters after {results['step']:,} steps, seeds {seeds}; "
        "those of one seed share first weights and batches. Bands are the range of the seeds. Frechet "
        f"distances of {settings['samples']:,} samples of one noise, biased upwards alike for all. "
        f"Differences to {first} at the last step, paired by seed, with Student's 95 % intervals:"
    ]
    told += [_difference_in_words(one) for target in results["targets"] for one in target["differences"]]
    batches, batch = settings["noise_batches"], settings["noise_batch"]
    told.append(
        f"Variances at the weights of {first}: of the target over {settings['noise_draws']} redraws of the "
        f"pair through each of {batches} x {batch} points x_t, of the gradient over {batches} batches of "
        f"{batch}. The pairs of otcfm have no law at a point in closed form: none is redrawn."
    )
    return " ".join([*told, facts(document)])


def _difference_in_words(one: dict[str, Any]) -> str:
    return (
        f"{one['target']}, {one['extractor']} to {one['reference']}: {one['mean']:+.3g} "
        f"({one['low']:+.3g} to {one['high']:+.3g});"
    )


EXPERIMENT = Experiment(
    name="targets",
    title="Does a less stochastic target generalise worse?",
    about="CFM, OT-CFM, EFM-M, EFM and EFM-unbiased side by side: sample quality, error, gradient noise.",
    claim=(
        "Regressing on (estimates of) the closed form does not harm generalisation: EFM is no worse than CFM "
        "(classifier-FID on MNIST after 25 epochs: CFM 2.28, M = 128 2.10, M = 256 2.08, M = 1024 1.84)."
    ),
    settings=TargetSettings,
    needs=("index",),
    takes=("held_out",),
    measure=measure,
    draw=draw,
    caption=caption,
    trains=True,
)
