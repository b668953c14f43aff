"""The plane and the trajectories: weights and densities by hand, ends and leading images by brute force."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from contract import pixels_of
from oracles import log_density as density_by_hand
from PIL import Image
from refusals import refused
from stores import store_of

from nnflow.config import resolve
from nnflow.errors import InputError
from nnflow.figures.inputs import Inputs, weights_fingerprint
from nnflow.figures.plane import EXPERIMENT as PLANE
from nnflow.figures.plane import PlaneSettings, disagreement, film_times, grid_of, log_density, weights_at
from nnflow.figures.points import SETS, places, points_store, store_of_points
from nnflow.figures.trajectories import EXPERIMENT as TRAJECTORIES
from nnflow.figures.trajectories import TrajectorySettings
from nnflow.figures.walk import leading, walk, walk_learned
from nnflow.sampling import noise_of
from nnflow.store import to_float
from nnflow.training import train
from nnflow.unet import LearnedVelocity, build
from nnflow.velocity import EmpiricalVelocity

# ---------------------------------------------------------------------- points


@pytest.mark.parametrize("name", SETS)
def test_point_sets_are_where_they_belong(name: str) -> None:
    store = points_store(name, 200, 3)
    points = places(store)
    assert points.abs().max() < 1  # none was clamped
    assert len(points) == (3 if name == "three points" else 200)
    again, other = points_store(name, 200, 3), points_store(name, 200, 4)
    assert again.fingerprint == store.fingerprint
    assert (other.fingerprint == store.fingerprint) == (name == "three points")
    slack = 0.5 / 127.5
    if name == "eight Gaussians":
        angle = torch.atan2(points[:, 1], points[:, 0]) / (math.pi / 4)
        assert (angle - angle.round()).abs().max() < 0.5
        assert torch.equal(angle.round().remainder(8).int(), (torch.arange(200) % 8).int())
        assert (points.norm(dim=1) - 0.8).abs().max() < 5 * 0.06
    if name == "checkerboard":
        inside = (points + 0.9) / 0.45
        near_edge = ((inside - inside.round()).abs() < slack / 0.45).any(1)
        cells = inside.floor().int()
        assert (cells[~near_edge].sum(1) % 2 == 0).all()
        assert len(cells.unique(dim=0)) >= 8
    if name == "two moons":
        circles = points * 1.7 + torch.tensor([0.5, 0.25])
        upper = circles[::2].norm(dim=1)  # about the origin, the other about (1, .5)
        lower = (circles[1::2] - torch.tensor([1.0, 0.5])).norm(dim=1)
        assert (torch.cat([upper, lower]) - 1).abs().max() < 5 * 0.05 + 2 * slack
        assert upper.mean().item() == pytest.approx(1, abs=0.03)
        assert lower.mean().item() == pytest.approx(1, abs=0.03)


def test_no_such_set() -> None:
    with refused(InputError, "'four moons': wanted one of three points"):
        points_store("four moons", 3, 0)
    with refused(InputError, "0 points"):
        points_store("two moons", 0, 0)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9, 0.99])
def test_weights_and_density_by_hand(t: float) -> None:
    """Each weight is the ratio of two mixtures' densities, both summed in Python's own floats."""
    store = points_store("two moons", 7, 1)
    field, points = EmpiricalVelocity.exact(store), places(store)
    x = torch.tensor([[0.1, 0.2], [-1.5, 0.4], [2.0, -2.0]])
    times = torch.full((3,), t)
    whole = density_by_hand(points, x, times)
    wanted = torch.stack([(density_by_hand(p[None], x, times) - whole).exp() for p in points], 1)
    torch.testing.assert_close(weights_at(field, x, t), wanted, rtol=2e-4, atol=1e-7)
    log_p = whole - math.log(7 * 2 * math.pi * (1 - t) ** 2)
    torch.testing.assert_close(log_density(field, x, t), log_p, rtol=1e-5, atol=1e-4)


def test_the_density_is_one() -> None:
    field = EmpiricalVelocity.exact(points_store("three points", 3, 0))
    grid = grid_of(101)
    cell = (grid[1, 0] - grid[0, 0]).item() ** 2
    assert log_density(field, grid, 0.6).exp().sum().item() * cell == pytest.approx(1, abs=2e-3)


def test_disagreement_of_two_points_by_hand() -> None:
    """Half way between them they cancel; on the way of the mean of one, only that is left; else by hand."""
    store = store_of_points(torch.tensor([[0.6, 0.0], [-0.6, 0.0]]))
    a = to_float(store.pixels)[0, 0].item()
    field, t = EmpiricalVelocity.exact(store), 0.8
    x = torch.tensor([[0.0, 0.0], [t * a, 0.0], [0.05, 0.3]])
    found = disagreement(field, x, t)
    assert found.share[0].item() == pytest.approx(1, abs=1e-4)
    assert found.share[1].item() < 2e-3  # a weight of 1e-5, and 6 between the two velocities
    height = to_float(store.pixels)[0, 1].item()
    weight = 1 / (1 + math.exp(-2 * t * 0.05 * a / (1 - t) ** 2))
    ways = [
        ((a - 0.05) / (1 - t), (height - 0.3) / (1 - t)),
        ((-a - 0.05) / (1 - t), (height - 0.3) / (1 - t)),
    ]
    mean = [weight * p + (1 - weight) * q for p, q in zip(*ways, strict=True)]
    square = weight * sum(v * v for v in ways[0]) + (1 - weight) * sum(v * v for v in ways[1])
    assert found.velocity[2].tolist() == pytest.approx(mean, rel=1e-4)
    assert found.share[2].item() == pytest.approx(1 - sum(v * v for v in mean) / square, rel=1e-3)


def test_plane_from_settings_to_pictures(tmp_path: Path) -> None:
    settings = PlaneSettings(points=6, times=(0.2, 0.9), grid=9, trajectories=5, steps=50, film=2)
    document = PLANE.run(settings, Inputs(out=tmp_path))
    sets = {found["name"]: found for found in document.results["sets"]}
    assert list(sets) == list(SETS)
    for found in sets.values():
        assert len(found["points"]) == (3 if found["name"] == "three points" else 6)
        ends = torch.tensor([way[-1] for way in found["trajectories"]])
        nearest = torch.cdist(ends, torch.tensor(found["points"])).amin(1)
        assert nearest.max() < 0.02  # the last step begins at t = .98
        assert all(len(way) == 51 for way in found["trajectories"])
        starts = torch.tensor([way[0] for way in found["trajectories"]])
        torch.testing.assert_close(starts, noise_of(range(5), (1, 1, 2)).flatten(1), atol=1e-4, rtol=0)
        for moment in found["moments"]:
            most, least = moment["crossings"]
            assert most["disagreement"] >= least["disagreement"]
            for crossing in (most, least):
                assert sum(crossing["weights"]) == pytest.approx(1, abs=1e-3)
    drawn = PLANE.draw(document, tmp_path)
    names = ["plane.png", "plane.pdf", "plane-stochastic.png", "plane-stochastic.pdf", "plane-film.gif"]
    assert [path.name for path in drawn] == names
    with Image.open(tmp_path / "plane-film.gif") as film:
        assert film.n_frames == 2
        assert film.info["loop"] == 0
    assert "two moons n = 6" in PLANE.caption(document)


def test_the_film_ends_before_the_data() -> None:
    assert film_times(0) == ()
    times = film_times(7)
    assert times[0] == 0
    assert times[-1] == 0.97
    steps = [b - a for a, b in pairwise(times)]
    assert steps == sorted(steps, reverse=True)


# ---------------------------------------------------------------------- walks


def test_u_star_walks_to_points_and_tells_them_on_the_way() -> None:
    """The leading point and ESS at every step, from weights by hand at the place the step began."""
    store = points_store("eight Gaussians", 9, 0)
    field, points = EmpiricalVelocity.exact(store), places(store)
    states = list(walk(field, noise_of(range(6), field.shape), 20))
    assert [state.t for state in states] == [step / 20 for step in range(20)]
    before = None
    for state in states:
        x = state.x.flatten(1)
        times = torch.full((6,), state.t)
        whole = density_by_hand(points, x, times)
        weights = torch.stack([(density_by_hand(p[None], x, times) - whole).exp() for p in points], 1)
        torch.testing.assert_close(state.ess.double(), 1 / weights.square().sum(1), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(
            state.mean.flatten(1).double(), weights @ points.double(), rtol=0, atol=2e-3
        )
        before = leading(store, state, before, memory=1 << 24)
        assert torch.equal(before, weights.argmax(1) if state.t else torch.full((6,), -1))
    assert states[0].ess.min() == pytest.approx(9)
    assert not states[-1].going.all()
    for state, after in pairwise(states):
        moved = state.x + (state.mean - state.x) / (1 - state.t) / 20
        torch.testing.assert_close(after.x, moved)


def test_leading_images_among_mirrored_ones_and_within_a_class(tmp_path: Path) -> None:
    store = store_of(pixels_of(10), tmp_path, classes=["a"] * 4 + ["b"] * 6)
    images = store.images(torch.arange(10))
    (state,) = walk(EmpiricalVelocity.exact(store), noise_of(range(5), store.shape[1:]), 1)
    x = torch.stack([images[3], images[7].flip(-1), images[0], images[8], images[5]])
    state = type(state)(0.5, 0.5 * x, x, torch.ones(5), torch.ones(5, dtype=torch.bool))
    assert leading(store, state, None, memory=1 << 24).tolist()[2:] == [0, 8, 5]
    assert leading(store, state, None, flip=True, memory=1 << 24).tolist() == [3, 17, 0, 8, 5]
    label = torch.tensor([1, 1, 1, 0, 0])
    found = leading(store, state, None, label, memory=1 << 24)
    gaps = torch.cdist(x.flatten(1), images.flatten(1))
    gaps[:3, :4] = gaps[3:, 4:] = torch.inf
    assert torch.equal(found, gaps.argmin(1))
    *_, last = walk(EmpiricalVelocity.exact(store), noise_of(range(5), store.shape[1:]), 50, label)
    ends = torch.cdist(last.mean.flatten(1), images.flatten(1)).argmin(1)
    assert (ends >= 4).tolist() == [True, True, True, False, False]  # each within its class
    state.going[:] = False  # those of the step before are kept
    assert leading(store, state, torch.arange(5), memory=1 << 24).tolist() == [0, 1, 2, 3, 4]


def test_a_network_that_stands_still_stays_where_it_is(tmp_path: Path) -> None:
    """A fresh network is u_theta = 0: x stays x0, and its mean is x0 too; u* still says who leads."""
    store = store_of(pixels_of(6), tmp_path)
    tiny = resolve("digits", {"channels": "8", "blocks": 1, "head_dim": 8})
    learned = build(tiny, (3, 4, 4)).eval()
    field, noise = EmpiricalVelocity.exact(store), noise_of(range(3), store.shape[1:])
    for state in walk_learned(learned, field, noise, 4):
        assert torch.equal(state.x, noise)
        assert torch.equal(state.mean, noise)
        torch.testing.assert_close(state.ess, field.estimate(noise, state.t).ess)


# ---------------------------------------------------------------------- trajectories


def test_trajectories_of_both_fields(tmp_path: Path) -> None:
    store = store_of(pixels_of(12), tmp_path)
    tiny = {"target": "efm-m", "samples": 2, "channels": "8", "blocks": 1, "head_dim": 8, "batch": 2}
    train(store, tmp_path / "run", resolve("digits", tiny | {"steps": 1, "sample_every": 0, "flip": True}))
    inputs = Inputs(out=tmp_path / "o", index=tmp_path / "out", run=tmp_path / "run")
    settings = TrajectorySettings(seeds=10, steps=10, strips=2, frames=(0.0, 0.42, 0.5))
    document = TRAJECTORIES.run(settings, inputs)
    found = document.results
    assert found["frames"] == [0.0, 0.4, 0.5]
    assert found["flip"]
    ours, theirs = found["tracks"]
    assert (ours["name"], theirs["name"]) == ("u*", "u_theta")
    assert [len(track["ess"]) for track in found["tracks"]] == [10, 10]
    assert ours["ess"][0][0] == pytest.approx(24, rel=1e-4)  # all images and their mirror images, at t = 0
    assert ours["ess"][0] != ours["ess"][1]
    assert len({tuple(row) for row in ours["leading"]}) > 1
    assert all(row[0] == -1 and max(row) < 24 for row in ours["leading"])
    for when, row in zip(ours["decided"], ours["leading"], strict=True):
        place = found["times"].index(when)
        assert set(row[place:]) == {row[-1]}
        assert place == 0 or row[place - 1] != row[-1]
    for parted, mine, other in zip(found["parted"], ours["leading"], theirs["leading"], strict=True):
        assert (parted is None) == (mine[-1] == other[-1])
    assert [row[0] for row in found["apart"]] == [0.0] * 10
    assert min(row[-1] for row in found["apart"]) > 0.1  # the network has hardly moved
    assert [len(strip) for strip in ours["strip_x"]] == [3, 3]
    drawn = TRAJECTORIES.draw(document, tmp_path / "o")
    assert [path.suffix for path in drawn] == [".png", ".pdf"] * 2
    assert "10 trajectories (noise seeds 0 to 9), 10 Euler steps" in TRAJECTORIES.caption(document)
    assert document.provenance["inputs"]["run"]["step"] == 1
    alone = TRAJECTORIES.run(settings, Inputs(out=tmp_path / "a", index=tmp_path / "out"))
    assert len(alone.results["tracks"]) == 1
    assert alone.results["parted"] is None
    assert not alone.results["flip"]
    parts = list((tmp_path / "o" / "parts" / "trajectories").glob("seeds-*.json"))
    assert len(parts) == 2


def test_weights_have_a_fingerprint(tmp_path: Path) -> None:
    tiny = {"channels": "8", "blocks": 1, "head_dim": 8}
    for seed in (0, 1):
        network = build(resolve("digits", tiny | {"seed": seed}), (3, 4, 4))
        network.unet.save_pretrained(tmp_path / str(seed))  # type: ignore[operator]
    first, second = (weights_fingerprint(tmp_path / name) for name in "01")
    assert first != second == weights_fingerprint(tmp_path / "1")
    assert LearnedVelocity.open(tmp_path / "0").shape == (3, 4, 4)
    (tmp_path / "empty").mkdir()
    with refused(InputError, "no trained network there"):
        weights_fingerprint(tmp_path / "empty")
