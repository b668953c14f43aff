"""LearnedVelocity: the call every field answers, and folders that others can open."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file
from torchdiffeq import odeint

from nnflow.config import PRESETS, resolve
from nnflow.errors import CheckpointError, InputError, MissingExtraError
from nnflow.unet import WEIGHTS, LearnedVelocity, build
from nnflow.velocity import HybridVelocity, Velocity

TINY = {"channels": (8, 16), "head_dim": 8, "attention": (4,)}


def network(shape=(3, 8, 8), classes=0, **knobs):
    """A small network whose last layer is not zero, so that its answer says something."""
    config = resolve("digits", TINY | {"class_conditional": classes > 0} | knobs)
    field = build(config, shape, classes)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        torch.nn.init.normal_(field.unet.conv_out.weight, std=0.1)
    return field.eval().requires_grad_(False)


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_paper_network_has_its_size():
    with torch.device("meta"):
        field = build(PRESETS["cifar10"], (3, 32, 32))
    count = sum(parameter.numel() for parameter in field.parameters())
    assert round(count / 1e6, 1) == 35.7
    kinds = [type(block).__name__ for block in field.unet.down_blocks]
    assert kinds == ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"]
    kinds = [type(block).__name__ for block in field.unet.up_blocks]
    assert kinds == ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]
    drops = {m.p for m in field.modules() if isinstance(m, torch.nn.Dropout) and m.p}
    assert drops == {0.1}


def test_the_network_for_64_x_64_has_its_size():
    with torch.device("meta"):
        field = build(PRESETS["imagenet64"], (3, 64, 64))
    assert sum(parameter.numel() for parameter in field.parameters()) == 264_904_515
    kinds = [type(block).__name__ for block in field.unet.down_blocks]
    assert kinds == ["DownBlock2D"] + 3 * ["AttnDownBlock2D"]
    heads = {module.heads for module in field.unet.modules() if hasattr(module, "heads")}
    assert heads == {6, 9, 12}  # of 64 channels each: at 32, 16 and 8 pixels


def test_it_is_a_field():
    field = network()
    assert isinstance(field, Velocity)
    x = images(2, 3, 8, 8)
    hybrid = HybridVelocity(field, field, 0.5)
    torch.testing.assert_close(hybrid(x, torch.tensor([0.1, 0.9])), field(x, torch.tensor([0.1, 0.9])))


def test_it_is_the_network_of_diffusers_at_a_thousand_t():
    field, x = network(), images(2, 3, 8, 8)
    for t in (0.0, 0.3, 1.0):
        expected = field.unet(x, torch.tensor(t * 1000)).sample
        torch.testing.assert_close(field(x, t), expected)
        torch.testing.assert_close(field(x=x, t=torch.full((2,), t)), expected)


def test_a_fresh_network_is_zero_and_depends_on_its_seed():
    field = build(resolve("digits", TINY), (3, 8, 8)).eval()
    assert not field(images(2, 3, 8, 8), 0.5).any()
    same, other = (build(resolve("digits", TINY | {"seed": s}), (3, 8, 8)) for s in (0, 1))
    key = "unet.conv_in.weight"
    assert torch.equal(field.state_dict()[key], same.state_dict()[key])
    assert not torch.equal(field.state_dict()[key], other.state_dict()[key])


def test_building_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    network()
    assert torch.equal(torch.rand(3), expected)


def test_times_a_fiftieth_apart_are_told_apart():
    """Unscaled, at t itself, the embeddings of any two times correlate to .99 or more."""
    field, x = network(), images(1, 3, 8, 8)
    seen = []
    field.unet.time_proj.register_forward_hook(lambda _, __, out: seen.append(out[0]))
    for t in (0.12, 0.14, 0.5):
        field(x, t)
    assert torch.cosine_similarity(seen[0], seen[1], dim=0) < 0.95
    assert torch.cosine_similarity(seen[0], seen[2], dim=0) < 0.95


@pytest.mark.parametrize("sides", [(28, 28), (7, 5), (9, 16), (1, 1)])
def test_sides_that_cannot_be_halved_are_padded(sides):
    field = network((1, *sides), channels=(8, 8, 16))
    x = images(3, 1, *sides)
    out = field(x, 0.4)
    assert out.shape == x.shape
    high, wide = (side + -side % 4 for side in sides)
    top, left = (high - sides[0]) // 2, (wide - sides[1]) // 2
    larger = torch.zeros(3, 1, high, wide)
    larger[:, :, top : top + sides[0], left : left + sides[1]] = x
    whole = field.unet(larger, torch.tensor(400.0)).sample
    torch.testing.assert_close(out, whole[:, :, top : top + sides[0], left : left + sides[1]])


def test_each_image_is_answered_by_itself():
    field, x, t = network(), images(4, 3, 8, 8), torch.tensor([0.0, 0.2, 0.7, 1.0])
    alone = torch.cat([field(x[row : row + 1], t[row]) for row in range(4)])
    torch.testing.assert_close(field(x, t), alone, rtol=1e-4, atol=1e-6)


def test_classes_are_told_apart_and_labels_checked():
    field, x = network(classes=3), images(2, 3, 8, 8)
    both = field(x, 0.5, torch.tensor([0, 2]))
    torch.testing.assert_close(both[0], field(x, 0.5, 0)[0])
    torch.testing.assert_close(both[1], field(x, 0.5, label=2)[1])
    assert not torch.allclose(field(x, 0.5, 0), field(x, 0.5, 1))
    for label in (
        None,
        3,
        -1,
        torch.tensor([0, 3]),
        torch.tensor([0.0, 1.0]),
        torch.zeros(3).long(),
    ):
        with pytest.raises(InputError, match=r"label|class-conditional"):
            field(x, 0.5, label)
    with pytest.raises(InputError, match="leave out label="):
        network()(x, 0.5, 0)
    with pytest.raises(InputError, match="no classes"):
        build(resolve("digits", TINY | {"class_conditional": True}), (3, 8, 8), 0)


@pytest.mark.parametrize(
    ("x", "t", "message"),
    [
        (images(2, 3, 8, 9), 0.5, r"\(2, 3, 8, 9\): the network takes \(B, 3, 8, 8\)"),
        (images(3, 8, 8), 0.5, "shape"),
        (images(2, 3, 8, 8).double(), 0.5, "float64: wanted float32"),
        ((images(2, 3, 8, 8) * 9).byte(), 0.5, "uint8: wanted float32"),
        (images(2, 3, 8, 8).log(), 0.5, "NaN"),
        (images(2, 3, 8, 8), 1.01, r"wanted \[0, 1\]"),
        (images(2, 3, 8, 8), -0.01, r"wanted \[0, 1\]"),
        (images(2, 3, 8, 8), float("nan"), r"wanted \[0, 1\]"),
        (images(2, 3, 8, 8), torch.tensor([0.5, 1.5]), r"from 0.5 to 1.5: wanted \[0, 1\]"),
        (images(2, 3, 8, 8), torch.zeros(3), r"shape \(3,\): wanted one number, or one per image"),
        (images(2, 3, 8, 8).to("meta"), 0.5, "x is on meta, the network on cpu"),
    ],
)
def test_bad_queries_are_refused_in_one_line(x, t, message):
    with pytest.raises(InputError, match=message) as caught:
        network()(x, t)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "options"), [("euler", {"step_size": 0.1}), ("dopri5", {"step_t": torch.ones(1)})]
)
def test_torchdiffeq_takes_it_up_to_t_one(method, options):
    """A field linear in t: x(1) - x(0) is a + b / 2 on paper, and Euler's a + .45 b."""
    field, x = network(), images(2, 3, 8, 8)

    class Linear(torch.nn.Module):
        dtype = torch.float32

        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, t, class_labels, return_dict):
            return (torch.full_like(x, 3.0) + 2 * (t / 1000)[:, None, None, None],)

    field.unet = Linear()
    end = odeint(lambda t, x: field(x=x, t=t), x, torch.tensor([0.0, 1.0]), method=method, options=options)[1]
    expected = 3.9 if method == "euler" else 4.0
    torch.testing.assert_close(end - x, torch.full_like(x, expected), rtol=1e-4, atol=1e-4)


def test_a_saved_network_opens_here_and_in_diffusers(tmp_path):
    field, x = network((1, 7, 7), classes=2), images(2, 1, 7, 7)
    field.unet.save_pretrained(tmp_path / "net")
    opened = LearnedVelocity.open(tmp_path / "net", device="cpu")
    assert (opened.shape, opened.classes, opened.config) == ((1, 7, 7), 2, None)
    assert not opened.training
    assert not any(parameter.requires_grad for parameter in opened.parameters())
    assert torch.equal(opened(x, 0.3, 1), field(x, 0.3, 1))
    theirs = UNet2DModel.from_pretrained(tmp_path / "net")
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, field.unet.state_dict()[name]), name


def truncate(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def empty(folder):
    (folder / WEIGHTS).write_bytes(b"")


def pickled(folder):
    torch.save({"conv_in.weight": torch.zeros(1)}, folder / WEIGHTS)


def missing(folder):
    (folder / WEIGHTS).unlink()


def lacking(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors.pop("conv_in.bias")
    save_file(tensors, folder / WEIGHTS)


def extra(folder):
    save_file(load_file(folder / WEIGHTS) | {"strange": torch.zeros(1)}, folder / WEIGHTS)


def reshaped(folder):
    save_file(load_file(folder / WEIGHTS) | {"conv_in.bias": torch.zeros(3)}, folder / WEIGHTS)


def retyped(folder):
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {"conv_in.bias": tensors["conv_in.bias"].double()}, folder / WEIGHTS)


def wider(folder):
    change(folder, block_out_channels=[8, 32])


def foreign(folder):
    change(folder, _class_name="AutoencoderKL")


def senseless(folder):
    change(folder, block_out_channels=["a"])


def sizeless(folder):
    change(folder, sample_size=None)


def garbled(folder):
    (folder / "config.json").write_text('{"_class_name": ')


def listed(folder):
    (folder / "config.json").write_text("[]")


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "damage",
    [
        *(truncate, empty, pickled, missing, lacking, extra, reshaped, retyped),
        *(wider, foreign, senseless, sizeless, garbled, listed),
    ],
)
def test_damaged_folders_are_refused_in_one_line_naming_the_file(tmp_path, damage):
    network().unet.save_pretrained(tmp_path / "net")
    damage(tmp_path / "net")
    with pytest.raises(CheckpointError) as caught:
        LearnedVelocity.open(tmp_path / "net")
    message = str(caught.value)
    assert "\n" not in message
    assert str(tmp_path / "net") in message
    assert WEIGHTS in message or "config.json" in message


def test_a_folder_without_a_network_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=r"config\.json: no such file.*name a run"):
            LearnedVelocity.open(folder)


def test_without_the_extra_the_message_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'nnflow\[train\]'"):
        build(resolve("digits", TINY), (3, 8, 8))


def test_importing_costs_no_extra():
    code = """
import sys, nnflow.training
sys.exit(any(name in sys.modules for name in ("diffusers", "accelerate", "tensorboard")))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
