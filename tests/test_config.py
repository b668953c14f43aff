"""TrainConfig: ranges, round trips, and what keeps two runs apart."""

import dataclasses
import json

import pytest

from nnflow.config import BOOKKEEPING, PRESETS, TrainConfig, differences, resolve
from nnflow.errors import InputError
from nnflow.targets import TARGETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_survives_json(name):
    config = PRESETS[name]
    again = TrainConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert again == config
    assert isinstance(again.channels, tuple)


def test_every_knob_survives_json_away_from_its_default():
    """A knob that from_json dropped would come back as the default."""
    other = {
        int: lambda v: v + 1,
        float: lambda v: v * 0.5,
        bool: lambda v: not v,
        tuple[int, ...]: lambda v: (*v, 192),
    }
    for knob in dataclasses.fields(TrainConfig):
        default = getattr(TrainConfig(), knob.name)
        if knob.type is str:
            choices = knob.metadata["choices"] or ("3GiB",)
            value = next(choice for choice in choices if choice != default)
        else:
            value = other[knob.type](default)
        if knob.name == "head_dim":
            value = 32
        config = resolve("cifar10", {knob.name: value})
        assert getattr(config, knob.name) == value != default
        assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_the_paper_recipe_is_the_default_and_a_preset():
    config = PRESETS["cifar10"]
    assert config == TrainConfig()
    assert (config.batch, config.learning_rate, config.warmup) == (128, 2e-4, 5_000)
    assert (config.ema_decay, config.clip, config.steps) == (0.9999, 1.0, 500_000)
    assert (config.channels, config.blocks, config.attention) == ((128, 256, 256, 256), 2, (16,))
    assert config.flip
    assert config.dropout == 0.1
    assert (config.field, config.tolerance) == ("near-and-far", 0.01)


def test_imagenet64_has_the_widths_of_adm():
    config = PRESETS["imagenet64"]
    assert (config.channels, config.blocks) == ((192, 384, 576, 768), 3)
    assert (config.attention, config.head_dim, config.dropout) == ((32, 16, 8), 64, 0.1)
    assert (config.learning_rate, config.mixed_precision) == (1e-4, "bf16")
    assert (config.target, config.field, config.prefetch) == ("efm", "near-and-far", "auto")


def test_digits_ask_for_no_calibration():
    assert PRESETS["digits"].field == "exact"


def test_targets_are_those_of_the_matcher():
    (knob,) = [knob for knob in dataclasses.fields(TrainConfig) if knob.name == "target"]
    assert knob.metadata["choices"] == TARGETS


def test_every_knob_tells_the_command_line_what_it_is():
    for knob in dataclasses.fields(TrainConfig):
        assert len(knob.metadata["help"]) > 8, knob.name
        assert {"low", "high", "choices"} <= set(knob.metadata)
    assert {knob.name for knob in dataclasses.fields(TrainConfig)} >= BOOKKEEPING


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, r"steps is 0: wanted a whole number from 1"),
        ({"steps": 1.5}, r"steps is 1\.5: wanted a whole number"),
        ({"steps": True}, r"steps is True: wanted a whole number"),
        ({"batch": -4}, r"batch is -4"),
        ({"batch": 2**70}, r"batch is 1180591620717411303424"),
        ({"learning_rate": float("nan")}, r"learning_rate is nan: wanted a number from 1e-12 to"),
        ({"learning_rate": 0}, r"learning_rate is 0"),
        ({"clip": float("inf")}, r"clip is inf"),
        ({"ema_decay": 1.0}, r"ema_decay is 1\.0"),
        ({"dropout": 1.0}, r"dropout is 1\.0"),
        ({"flip": 1}, r"flip is 1: wanted true or false"),
        ({"target": "otcfm"}, r"target is 'otcfm': wanted one of cfm, efm-m"),
        ({"field": None}, r"field is None: wanted one of exact, nearest, near-and-far"),
        ({"tolerance": 0.0}, r"tolerance is 0\.0: wanted a number from 1e-06 to 1"),
        ({"memory": "much"}, r"memory budget 'much'"),
        ({"channels": []}, r"channels is empty"),
        ({"channels": "64,x"}, r"channels is '64,x': wanted whole numbers such as 32,64"),
        ({"channels": 64}, r"channels is 64: wanted whole numbers"),
        ({"channels": (64, 60), "head_dim": 4}, r"60 is not a multiple of 8"),
        ({"channels": (64, 96)}, r"head_dim 64 does not divide 96 of channels 64,96; try 32"),
        ({"learnin_rate": 1e-4}, r"unknown knob learnin_rate; known are target"),
        ({"a\nb": 1}, r"unknown knob a\\nb;"),
    ],
)
def test_a_bad_knob_is_refused_in_one_line(values, message):
    with pytest.raises(InputError, match=message) as caught:
        resolve("cifar10", values)
    assert "\n" not in str(caught.value)


def test_an_unknown_preset_is_refused():
    with pytest.raises(InputError, match="unknown preset 'cifar'; known are cifar10, imagenet64, digits"):
        resolve("cifar", {})


def test_tuples_come_as_text_too():
    assert resolve("digits", {"channels": "32, 96", "attention": ""}).channels == (32, 96)
    assert resolve("digits", {"attention": ""}).attention == ()


def test_a_preset_cannot_be_changed():
    with pytest.raises(TypeError):
        PRESETS["digits"] = TrainConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["digits"].steps = 3


def test_differences_name_each_knob_with_both_values():
    saved = resolve("digits", {"seed": 1})
    wanted = saved.replace({"seed": 2, "channels": (32, 32), "keep": 9})
    assert differences(saved, wanted) == "channels was 32,64, now 32,32; seed was 1, now 2"


def test_steps_may_grow_and_not_shrink():
    saved = resolve("digits", {"steps": 10})
    assert differences(saved, saved) == ""
    assert differences(saved, saved.replace({"steps": 11})) == ""
    assert differences(saved, saved.replace({"steps": 9})) == "steps was 10, now 9"
    assert differences(saved, saved.replace({"prefetch": "on"})) == ""


def test_everything_else_that_changes_weights_is_named():
    saved = TrainConfig()
    for knob in dataclasses.fields(TrainConfig):
        if knob.name in BOOKKEEPING | {"steps"}:
            continue
        changed = object.__new__(TrainConfig)
        changed.__dict__.update(saved.__dict__ | {knob.name: "other"})
        assert differences(saved, changed).startswith(f"{knob.name} was "), knob.name
