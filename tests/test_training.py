"""Training: the same weights whatever interrupts it, and refusals that lose nothing."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import PARTS, differ, points, same, script, spied, thirteen, tiny, workers
from safetensors.torch import load_file
from stores import store_of

from nnflow.batches import seed_of
from nnflow.errors import BusyError, CheckpointError, DegradedWarning, InputError
from nnflow.files import folder_lock
from nnflow.sampling import sample
from nnflow.training import train
from nnflow.unet import LearnedVelocity, newest_checkpoint


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors are tiny here: threads would only wait for each other."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return thirteen(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def straight(store, tmp_path_factory):
    """A run that nothing disturbed."""
    return train(store, tmp_path_factory.mktemp("runs") / "straight", tiny())


def test_the_same_run_twice_is_the_same(store, straight, tmp_path):
    torch.manual_seed(77)  # whatever the caller did before
    again = train(store, tmp_path / "again", tiny())
    same(straight.checkpoint, again.checkpoint)
    assert (straight.step, straight.interrupted) == (6, False)
    assert straight.loss == again.loss


@pytest.mark.parametrize("knobs", [{"seed": 1}, {"dropout": 0.0}, {"flip": False}, {"samples": 6}])
def test_each_knob_of_chance_matters(store, straight, tmp_path, knobs):
    """Else the comparison above would compare nothing."""
    other = train(store, tmp_path / "other", tiny(**knobs))
    assert differ(straight.checkpoint, other.checkpoint)


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_stopping_and_resuming_gives_the_same_weights(store, straight, tmp_path, stop):
    first = train(store, tmp_path / "run", tiny(steps=stop))
    assert first.checkpoint.name == f"step-{stop:08d}"
    torch.manual_seed(stop)
    second = train(store, tmp_path / "run", tiny(), resume=True)
    same(straight.checkpoint, second.checkpoint)
    assert second.step == 6


def test_resuming_a_finished_run_changes_nothing(store, tmp_path):
    first = train(store, tmp_path / "run", tiny(steps=2))
    before = {p: p.stat().st_mtime_ns for p in first.checkpoint.rglob("*")}
    again = train(store, tmp_path / "run", tiny(steps=2), resume=True)
    assert (again.checkpoint, again.step) == (first.checkpoint, 2)
    assert {p: p.stat().st_mtime_ns for p in again.checkpoint.rglob("*")} == before


def test_killed_and_resumed_gives_the_same_weights(store, straight, tmp_path):
    """SIGKILL in the middle of writing the checkpoint of step 4: step 2 is the last whole one.

    The killed run makes targets beside the network, the one that goes on with it does not.
    """
    killing = """
        config = config.replace({"prefetch": "on"})
        def kill(*_):
            os.kill(os.getpid(), signal.SIGKILL)
        usual = trainer.checkpoints.save
        def save(*args, step, **rest):
            if step == 4:
                trainer.checkpoints.write_json = kill
            return usual(*args, step=step, **rest)
        trainer.checkpoints.save = save
        training.train(store, run, config)
    """
    run = tmp_path / "run"
    code = script(store, run, killing)
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert newest_checkpoint(run).name == "step-00000002"
    assert (run / "checkpoints" / "step-00000004.partial").is_dir()
    time.sleep(1.1)  # TensorBoard orders its files by the second they were begun in
    resumed = train(store, run, tiny(), resume=True)
    same(straight.checkpoint, resumed.checkpoint)
    assert not list(run.glob("checkpoints/*.partial"))
    assert [step for step, _ in points(run)] == [2, 4, 6]  # step 4 was logged twice, shown once
    assert points(run) == points(straight.folder)


@pytest.mark.parametrize(("prefetch", "other"), [("on", "off"), ("off", "on")])
def test_sigint_saves_and_stops(store, straight, tmp_path, prefetch, other):
    def interrupt(model, step, folder):
        os.kill(os.getpid(), signal.SIGINT)

    knobs = {"sample_every": 3, "checkpoint_every": 1000, "prefetch": prefetch}
    usual = signal.getsignal(signal.SIGINT)
    stopped = train(store, tmp_path / "run", tiny(**knobs), on_sample=interrupt)
    assert signal.getsignal(signal.SIGINT) is usual
    assert (stopped.interrupted, stopped.step) == (True, 4)
    assert stopped.checkpoint.name == "step-00000004"
    resumed = train(store, tmp_path / "run", tiny(**knobs | {"prefetch": other}), resume=True)
    assert not resumed.interrupted
    same(straight.checkpoint, resumed.checkpoint)


def test_a_second_sigint_ends_it_at_once(store, tmp_path):
    def interrupt(model, step, folder):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(store, tmp_path / "run", tiny(sample_every=3, prefetch="on"), on_sample=interrupt)
    assert not workers()
    with folder_lock(tmp_path / "run"):  # nothing is held
        assert newest_checkpoint(tmp_path / "run").name == "step-00000002"


def test_samples_on_the_way_see_the_average_and_disturb_nothing(store, straight, tmp_path):
    seen = []

    def look(model, step, folder):
        torch.manual_seed(0)
        assert isinstance(model, LearnedVelocity)
        assert not model.training
        seen.append((step, folder, {k: v.clone() for k, v in model.unet.state_dict().items()}))

    done = train(store, tmp_path / "run", tiny(sample_every=4), on_sample=look)
    same(straight.checkpoint, done.checkpoint)
    assert [(step, folder) for step, folder, _ in seen] == [
        (4, tmp_path / "run" / "samples"),
        (6, tmp_path / "run" / "samples"),
    ]
    for step, _, weights in seen:
        saved = load_file(tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / PARTS[1])
        assert all(torch.equal(value, weights[name]) for name, value in saved.items())


def test_the_average_is_that_of_the_weights_on_the_way(store, tmp_path):
    """Unrolled by hand in float64 from the weights of every step."""
    run = train(store, tmp_path / "run", tiny(checkpoint_every=1, ema_decay=0.3)).folder
    weights, average = (
        [load_file(run / "checkpoints" / f"step-{step:08d}" / part) for step in range(7)]
        for part in PARTS[:2]
    )
    decays = [0.1, 2 / 11, 0.25, 0.3, 0.3, 0.3]  # (1 + s) / (10 + s) until .3
    shares = [0.0] * 7
    for step, decay in enumerate(decays):
        shares = [share * decay for share in shares]
        shares[0] += decay if step == 0 else 0
        shares[step + 1] += 1 - decay
    assert sum(shares) == pytest.approx(1)
    for name in weights[0]:
        expected = sum(share * one[name].double() for share, one in zip(shares, weights, strict=True))
        torch.testing.assert_close(average[6][name].double(), expected, rtol=1e-5, atol=1e-7)
        assert torch.equal(weights[0][name], average[0][name])


def test_warm_up_grows_linearly_and_then_stays(store, straight):
    rates = dict(points(straight.folder, "learning_rate"))
    full = tiny().learning_rate
    assert rates == pytest.approx({2: full / 2, 4: full, 6: full})


def test_the_first_step_moves_no_weight_further_than_adam_may(store, tmp_path):
    """Adam's first step is the rate times g / (|g| + 1e-8): a tenth of it in a warm-up of ten."""
    knobs = {"warmup": 10, "steps": 1, "learning_rate": 0.01}
    run = train(store, tmp_path / "run", tiny(**knobs)).folder
    zero, one = (load_file(run / "checkpoints" / f"step-0000000{n}" / PARTS[0]) for n in (0, 1))
    moved = max((one[name] - zero[name]).abs().max().item() for name in zero)
    assert moved == pytest.approx(0.001, rel=1e-3)


def test_gradients_are_clipped(store, tmp_path):
    """After one step Adam's first moment is a tenth of the clipped gradient: its norm tells."""
    norms = {}
    for clip in (0.0, 1e-3):
        run = train(store, tmp_path / str(clip), tiny(clip=clip, steps=1))
        moments = load_file(run.checkpoint / PARTS[2])
        first = [value for name, value in moments.items() if name.startswith("exp_avg.")]
        norms[clip] = torch.cat([value.flatten() for value in first]).norm().item() * 10
        ((_, logged),) = points(run.folder, "gradient_norm")
        assert logged == pytest.approx(norms[0.0], rel=1e-4)  # before clipping, whatever the clip
    assert norms[0.0] > 0.1
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-3)


def test_batches_are_uniform_draws_flipped_in_half(store, tmp_path, monkeypatch):
    spy = spied(monkeypatch)
    train(store, tmp_path / "run", tiny(steps=60, batch=50, checkpoint_every=60))
    merged = {
        key: torch.cat([asked[key] for asked in spy.asked])
        for key in ("x0", "x1", "t", "ids", "flipped", "labels")
    }
    images = store.images(merged["ids"])
    mirrored = merged["flipped"][:, None, None, None]
    assert torch.equal(merged["x1"], torch.where(mirrored, images.flip(-1), images))
    assert torch.equal(merged["labels"], store.labels[merged["ids"]])
    count = 3_000
    # five standard deviations of each statistic
    assert abs(merged["flipped"].float().mean() - 0.5) < 5 * 0.5 / count**0.5
    shares = merged["ids"].bincount(minlength=13) / count
    assert (shares - 1 / 13).abs().max() < 5 * (1 / 13 / count) ** 0.5
    assert abs(merged["t"].mean() - 0.5) < 5 * (1 / 12 / count) ** 0.5
    assert 0 <= merged["t"].min() < 0.01 < 0.99 < merged["t"].max() < 1
    assert abs(merged["x0"].mean()) < 5 / (count * 16) ** 0.5
    assert abs(merged["x0"].var() - 1) < 5 * (2 / count / 16) ** 0.5
    assert len(set(merged["t"].tolist())) > 0.99 * count  # no step repeats another's draws


def test_the_loss_is_the_mean_square_per_pixel(store, tmp_path, monkeypatch):
    """A fresh network answers 0, and stays there at this rate: 1, 4 and 9 of targets 1, 2, 3."""
    spied(monkeypatch, lambda step, ut: torch.full_like(ut, float(step)))
    knobs = {"steps": 3, "log_every": 3, "learning_rate": 1e-12}
    run = train(store, tmp_path / "run", tiny(**knobs))
    assert run.loss == pytest.approx(14 / 3, rel=1e-6)
    assert points(run.folder) == [(3, pytest.approx(14 / 3, rel=1e-6))]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(store, tmp_path, monkeypatch):
    spied(monkeypatch, lambda step, ut: ut * (float("inf") if step == 4 else 1))
    with pytest.raises(CheckpointError, match=r"^step 4: the loss.*step-00000002 is kept") as caught:
        train(store, tmp_path / "run", tiny(steps=50, checkpoint_every=2, log_every=50))
    assert "\n" not in str(caught.value)
    kept = newest_checkpoint(tmp_path / "run")
    assert kept.name == "step-00000002"
    assert all(value.isfinite().all() for value in load_file(kept / PARTS[0]).values())


def test_one_image_is_learnt(tmp_path):
    """One image m: u* = (m - x) / (1 - t), and samples end on m. The best constant scores 1."""
    pixels = torch.arange(0, 256, 16).byte().view(1, 1, 4, 4)
    one = store_of(pixels, tmp_path)
    knobs = {"target": "efm", "class_conditional": False, "flip": False, "dropout": 0.0}
    knobs |= {"steps": 240, "batch": 64, "channels": (16,), "checkpoint_every": 240}
    knobs |= {"learning_rate": 4e-3, "warmup": 20, "log_every": 10, "ema_decay": 0.95}
    done = train(one, tmp_path / "run", tiny(**knobs))
    first = points(done.folder)[0][1]
    assert first > 0.8
    assert done.loss < 0.12
    drawn = sample(LearnedVelocity.open(done.folder), list(range(8)), 30)
    off = (drawn - one.images(torch.zeros(1).long())).square().mean().sqrt()
    assert off < 0.15


def test_bf16_keeps_float32_weights_and_resumes(store, straight, tmp_path):
    knobs = {"mixed_precision": "bf16", "steps": 4}
    whole = train(store, tmp_path / "whole", tiny(**knobs))
    train(store, tmp_path / "run", tiny(**knobs | {"steps": 2}))
    same(whole.checkpoint, train(store, tmp_path / "run", tiny(**knobs), resume=True).checkpoint)
    for name, value in load_file(whole.checkpoint / PARTS[0]).items():
        assert value.dtype == torch.float32, name
    assert differ(whole.checkpoint, straight.folder / "checkpoints" / "step-00000004")
    rounded, exact = dict(points(whole.folder)), dict(points(straight.folder))
    assert rounded[4] == pytest.approx(exact[4], rel=0.02)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in fp16")
def test_fp16_without_a_gpu_is_refused(store, tmp_path):
    """Accelerate would train in float32 and say nothing."""
    with pytest.raises(InputError, match=r"fp16 needs a GPU.*bf16 or no"):
        train(store, tmp_path / "run", tiny(mixed_precision="fp16"))


def test_other_images_are_another_run(store, straight, tmp_path):
    pixels = (store.pixels + 1).view(13, 1, 4, 4)
    other = store_of(pixels, tmp_path, classes=["a"] * 5 + ["b"] * 8)
    before = newest_checkpoint(straight.folder)
    with pytest.raises(CheckpointError, match=f"images were {store.fingerprint}, now"):
        train(other, straight.folder, tiny(), resume=True)
    with pytest.raises(CheckpointError, match="batch was 6, now 12"):
        train(store, straight.folder, tiny(batch=12), resume=True)
    with pytest.raises(CheckpointError, match="continue it with --resume"):
        train(store, straight.folder, tiny())
    assert newest_checkpoint(straight.folder) == before


def test_two_trainings_in_one_folder_are_refused(store, tmp_path):
    with folder_lock(tmp_path / "run"), pytest.raises(BusyError, match="another process"):
        train(store, tmp_path / "run", tiny())
    assert not (tmp_path / "run" / "config.json").exists()


def test_the_callers_random_numbers_are_left_alone(store, tmp_path):
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    train(store, tmp_path / "run", tiny(steps=1))
    assert torch.equal(torch.rand(3), expected)


def test_steps_and_ranks_share_no_draws():
    seeds = {seed_of(s, step, rank) for s in (0, 1) for step in range(99) for rank in (0, 1)}
    assert len(seeds) == 2 * 99 * 2
    assert len({seed & ~1 for seed in seeds}) == len(seeds)


def test_the_bar_shows_the_loss(store, tmp_path, capsys):
    train(store, tmp_path / "run", tiny(steps=2), progress=True)
    told = capsys.readouterr()
    assert "2/2" in told.err
    assert "loss=" in told.err
    assert told.out == ""


def test_two_processes_train_one_network(store, straight, tmp_path):
    """Equal weights in both, halves of the batch drawn apart, one of them writing."""
    code = script(
        store,
        tmp_path / "run",
        """
        from safetensors.torch import save_file
        from nnflow import batches
        rank, seen, usual = os.environ["RANK"], [], batches.Batches.make
        def make(self, step):
            found = usual(self, step)
            seen.append(found.xt.clone())
            return found
        batches.Batches.make = make
        kept, first = [], trainer.Trainer.restore
        def restore(self):
            first(self)
            kept.append(self.network)
        trainer.Trainer.restore = restore
        def save(*args, usual=trainer.checkpoints.save, **rest):
            assert rank == "0"
            return usual(*args, **rest)
        trainer.checkpoints.save = save
        training.train(store, run, config.replace({"prefetch": "on"}))
        weights = {name: value.detach().clone() for name, value in kept[0].unet.state_dict().items()}
        save_file(weights | {"seen": torch.cat(seen)}, run + "." + rank)
        torch.distributed.destroy_process_group()
        """,
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | world | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
        )
        for rank in ("0", "1")
    ]
    for process in both:
        told = process.communicate(timeout=120)[1]
        assert process.returncode == 0, told.decode()
    run = tmp_path / "run"
    ours, theirs = (load_file(Path(f"{run}.{rank}")) for rank in (0, 1))
    assert ours.pop("seen").shape == (6 * 3, 1, 4, 4)
    assert not torch.equal(load_file(Path(f"{run}.0"))["seen"], theirs.pop("seen"))
    saved = load_file(newest_checkpoint(run) / PARTS[0])
    for name, value in saved.items():
        assert torch.equal(value, ours[name]), name
        assert torch.equal(value, theirs[name]), name
    assert differ(newest_checkpoint(run), straight.checkpoint)
    with pytest.warns(DegradedWarning, match="trained by 2 processes and goes on with 1"):
        train(store, run, tiny(steps=7), resume=True)
