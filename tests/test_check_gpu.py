"""scripts/check_gpu.py: start to finish on a CPU; a disagreement and a part that fails are reported."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
script = importlib.import_module("check_gpu")
bench = importlib.import_module("gpu_bench")
speed = importlib.import_module("gpu_speed")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["check_gpu", *map(str, arguments)])
    return script.main()


def test_start_to_finish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--device", "cpu", "--json", tmp_path / "a.json") == 0
    lines = json.loads((tmp_path / "a.json").read_text())
    assert {line["part"] for line in lines} == {"machine", "tests", "agreement", "speed", "training"}
    assert all(line["fine"] for line in lines)
    out = capsys.readouterr().out
    assert all(line.count("|") == 6 for line in out.splitlines() if line.startswith("|"))
    assert "nothing failed" in out


def test_a_disagreement_and_a_part_that_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The device's exact field is off by a thousandth; the benches break; all else goes on."""
    placed = bench.placed

    def off(*arguments: object) -> object:
        for place, field in placed(*arguments):
            whole = field.support.part
            if not isinstance(field.support, script.NearAndFar):
                field.support.part = lambda x, *rest, whole=whole: whole(1.001 * x, *rest)
            yield place, field

    def broken(bench: object) -> object:
        raise RuntimeError("no kernel image\nsecond line")
        yield

    monkeypatch.setattr(script, "placed", off)
    monkeypatch.setattr(script, "PARTS", (broken, script.agreement))
    assert run(monkeypatch, "--device", "cpu") == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if line.endswith("FAILED |")]
    assert "RuntimeError: no kernel image" in failed[0]
    assert len(failed) == 1 + 2 * 2  # exact and nearest, each at two places
    assert all("exact" in line or "nearest" in line for line in failed[1:])


def test_same_images_in_any_order() -> None:
    one = torch.tensor([[3, 1, -1], [3, 1, 2], [5, 5, 1]])
    other = torch.tensor([[-1, 3, 1], [3, 1, 4], [5, 1, 1]])
    assert script.same_images(one, other).tolist() == [True, False, False]
    assert not script.same_images(one, one[:, :2]).any()
    assert script.same_images(one[:, :0], one[:, :0]).all()  # all images, which no ids name


def test_a_step_is_halved_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the parts, the gradient is that of the whole batch."""
    generator = torch.Generator().manual_seed(0)
    network = torch.nn.Linear(4, 4)
    seen: list[int] = []

    def asked(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if len(x) > 3:
            raise torch.OutOfMemoryError("of what there is")
        seen.append(len(x))
        return network(x)

    x, ut = (torch.randn(10, 4, generator=generator) for _ in range(2))
    step = speed.Step(asked, torch.optim.SGD(network.parameters(), lr=0.0), x, torch.zeros(10), ut)
    step()
    assert step.parts == 4
    assert sum(seen) == 10
    found = network.weight.grad.clone()
    network.zero_grad()
    torch.nn.functional.mse_loss(network(x), ut).backward()
    torch.testing.assert_close(found, network.weight.grad, rtol=0.02, atol=0.01)  # bfloat16


def test_no_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "sees no GPU" in err
