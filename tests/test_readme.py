"""The README's Python runs, and its commands are ones the command line takes."""

import re
import shlex
from pathlib import Path

import click
import pytest
from contract import pixels_of
from PIL import Image

from nnflow.cli import cli

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def test_the_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On 30 images of 8 x 8 and with 2 steps of training instead of 1600."""
    (block,) = blocks("python")
    assert block.count("1600") == 1
    for number, image in enumerate(pixels_of(30)):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).resize((8, 8)).save(path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(block.replace("1600", "2"), names)  # the README is ours
    assert tuple(names["images"].shape) == (64, 1, 8, 8)  # type: ignore[attr-defined]
    assert "MemorisedFraction(" in capsys.readouterr().out


def commands() -> list[str]:
    lines = "\n".join(blocks("bash")).splitlines()
    return [line.split("#")[0].strip() for line in lines if line.startswith("nnflow ")]


@pytest.mark.parametrize("line", commands())
def test_the_commands_are_understood(line: str) -> None:
    _, name, *arguments = shlex.split(line)
    command = cli.commands[name]
    if isinstance(command, click.Group):
        name, *arguments = arguments
        command = command.commands[name]
    context = command.make_context(name, arguments)
    assert context.params


def test_the_readme_teaches_every_command() -> None:
    assert {line.split()[1] for line in commands()} == set(cli.commands)


def test_links_lead_somewhere() -> None:
    text = README.read_text(encoding="utf-8")
    local = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert local
    for link in local:
        assert (README.parent / link).exists(), link
