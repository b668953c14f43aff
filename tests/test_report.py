"""The report: one page that holds everything, whatever is missing; seen by a browser where there is one."""

import base64
import io
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from refusals import refused

from nnflow.cli import main
from nnflow.errors import StoreError
from nnflow.figures.experiment import Document
from nnflow.figures.registry import EXPERIMENTS
from nnflow.report import pictures_of, write_report

CAPTION = 'n = 5 images, d = 3 & <script>alert("x")</script>'
SOME = {
    "cosines": replace(EXPERIMENTS["cosines"], caption=lambda document: CAPTION + document.settings["tail"]),
    "plane": EXPERIMENTS["plane"],
    "trajectories": replace(EXPERIMENTS["trajectories"], needs=("index", "run")),
}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """What the page is made of: elements with their attributes, and the text within each kind."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
            self.text.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag  # well nested

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.text[tag][-1] += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results of `cosines` with two pictures and a film; nothing of the others."""
    Document(
        name="cosines",
        settings={"pairs": 5, "tail": " (seed 7)"},
        results={},
        missing=("size 256: too large",),
        provenance={
            "command": "nnflow figures cosines --index 'a b'",
            "inputs": {"index": {"shape": [5, 3, 1, 1]}},
        },
    ).save(tmp_path)
    for number, name in enumerate(("cosines.png", "cosines-strips.png", "cosines-film.gif")):
        Image.new("RGB", (4 + number, 3), "#0072B2").save(tmp_path / name)
    (tmp_path / "cosinesque.png").write_bytes(b"of another figure")
    return tmp_path


def test_the_page_holds_everything_and_asks_for_nothing(folder: Path) -> None:
    path = write_report(folder, SOME)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert not page.all("script") + page.all("link") + page.all("iframe") + page.all("object")
    addresses = re.findall(r"""(?:src|href|action|url)\s*[=(]\s*["']?([^"'\s)>]+)""", text)
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    images = page.all("img")
    assert [Image.open(io.BytesIO(base64.b64decode(i["src"].split(",")[1]))).size for i in images] == [
        (4, 3), (6, 3), (5, 3),
    ]  # fmt: skip
    assert all(image["alt"] for image in images)
    assert images[1]["src"].startswith("data:image/gif;base64,")
    assert page.text["figcaption"] == [CAPTION + " (seed 7)"]  # of the JSON, and no element of its own
    assert "size 256: too large" in page.text["ul"][0]
    assert "nnflow figures cosines --index 'a b'" in page.text["table"][0]
    assert {m.get("name") for m in page.all("meta")} >= {"viewport"}
    for part in ("prefers-color-scheme: dark", "@media print"):
        assert part in text


def test_what_is_not_made_is_named_with_its_command(folder: Path) -> None:
    page = Page(write_report(folder, SOME).read_text(encoding="utf-8"))
    sections = page.all("section")
    assert [section["id"] for section in sections] == ["cosines", "plane", "trajectories"]
    assert [section.get("class") for section in sections] == [None, "missing", "missing"]
    assert page.text["code"] == [
        f"nnflow figures plane --out {folder}",
        f"nnflow figures trajectories --index OUT --run RUN --out {folder}",
    ]
    assert [text.endswith("(not made yet)") for text in page.text["li"][:3]] == [False, True, True]
    links = [link["href"] for link in page.all("a")]
    assert links == ["#cosines", "#plane", "#trajectories"]
    for picture in pictures_of(folder, "cosines"):
        picture.unlink()
    page = Page(write_report(folder, SOME).read_text(encoding="utf-8"))
    assert page.text["code"][0] == f"nnflow figures cosines --redraw --out {folder}"


def test_the_same_folder_gives_the_same_bytes(folder: Path) -> None:
    first = write_report(folder, SOME).read_bytes()
    assert write_report(folder, SOME).read_bytes() == first
    assert not list(folder.glob("*.partial"))


def test_bad_folders(folder: Path, tmp_path: Path) -> None:
    with refused(StoreError, "no such folder"):
        write_report(tmp_path / "no", SOME)


def test_results_that_cannot_be_shown_are_told_in_their_place(folder: Path) -> None:
    """Of another version: no such format, or without what the picture needs; the others are shown."""
    document = Document.open(folder / "cosines.json")
    replace(document, name="plane").save(folder)
    for text in ('{"format": "other"}', "not even JSON", None):
        if text is not None:
            (folder / "cosines.json").write_text(text)
        else:
            replace(document, settings={}).save(folder)  # no "tail" for the caption
        page = Page(write_report(folder, SOME).read_text(encoding="utf-8"))
        assert [section.get("class") for section in page.all("section")] == ["missing"] * 3
        assert sum("Its results cannot be shown" in line for line in page.text["p"]) == 2
    with refused(StoreError, "cosines.json: results of another version.*KeyError: 'tail'"):
        SOME["cosines"].words(replace(document, settings={}))


def test_the_command(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "cosines.json").unlink()
    with pytest.raises(SystemExit) as exit_:
        main(["report", str(folder)])
    assert not exit_.value.code
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert [section["id"] for section in page.all("section")] == list(EXPERIMENTS)
    assert all(section["class"] == "missing" for section in page.all("section"))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: the page is not looked at by a browser")
@pytest.mark.parametrize("width", [1200, 400])
def test_a_browser_shows_the_page(folder: Path, tmp_path: Path, width: int) -> None:
    """Nothing is wider than the window, the pictures are there, and blue is on the screen."""
    path = write_report(folder, SOME)
    shot = tmp_path / "shot.png"
    command: list[str] = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1600",
    ]  # fmt: skip

    def run(*more: str) -> str:
        done = subprocess.run(
            [*command, *more, path.as_uri()], capture_output=True, text=True, timeout=120, check=True
        )
        return done.stdout

    run(f"--screenshot={shot}")
    with Image.open(shot) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[1] == width
    blue = (pixels == [0x00, 0x72, 0xB2]).all(-1).any(0).nonzero()[0]
    assert blue[-1] - blue[0] > 0.7 * min(width, 960)  # as wide as the page
    assert blue[-1] < width - 8  # and no wider
    dom = Page(run("--dump-dom"))
    assert len(dom.all("img")) == 3
    assert dom.text["figcaption"] == [CAPTION + " (seed 7)"]
