"""All figures of a folder as one page: DIR/report.html, opened without a server, a script or a request.

Pictures lie within the page as data; captions are those of the JSON beside them. What has not been made is
named with the command that makes it.
"""

import base64
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from nnflow.errors import StoreError
from nnflow.figures.experiment import Document, Experiment
from nnflow.files import shown, whole_file

PAGE = "report.html"
_KINDS = {".png": "image/png", ".gif": "image/gif"}

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --quiet: #595959; --line: #d0d0d0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #161616; --quiet: #a8a8a8; --line: #444; }
}
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { line-height: 1.2; } h2 { line-height: 1.25; margin: 0 0 .5rem; }
section { border-top: 1px solid var(--line); padding: 1.5rem 0; }
figure { margin: 1rem 0; }
img { display: block; width: 100%; height: auto; background: #fff; border-radius: .25rem;
  margin-bottom: .75rem; }
figcaption, .claim { color: var(--quiet); } .claim::before { content: "The paper: "; font-weight: 600; }
table { border-collapse: collapse; font-size: .85rem; width: 100%; }
caption { text-align: left; color: var(--quiet); padding: .25rem 0; }
th, td { text-align: left; vertical-align: top; padding: .15rem .75rem .15rem 0; font-weight: normal; }
th { color: var(--quiet); white-space: nowrap; }
code { font-size: .9em; background: color-mix(in srgb, var(--line) 35%, transparent); padding: .1em .3em; }
.missing p { margin: .5rem 0; }
@media print { body { font-size: 10pt; } main { max-width: none; padding: 0; }
  h2, .claim { break-inside: avoid; break-after: avoid; } table { font-size: 7pt; } nav { display: none; }
  img { break-inside: avoid; width: auto; max-width: 100%; max-height: 21cm;
    margin-left: auto; margin-right: auto; } }
"""


def write_report(folder: Path, experiments: Mapping[str, Experiment]) -> Path:
    """Writes `folder`/report.html of the results that lie there.

    Args:
        folder: where `nnflow figures` wrote.
        experiments: all there are, in the order of the page.

    Raises:
        StoreError: no such folder, or a disk that refuses.
    """
    if not folder.is_dir():
        raise StoreError(f"{shown(folder)}: no such folder; wanted the --out of nnflow figures")
    sections = [_section(folder, made) for made in experiments.values()]
    entries = [
        f'<li><a href="#{escape(made.name)}">{escape(made.title)}</a>{_state(folder, made)}</li>'
        for made in experiments.values()
    ]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    page = "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            "<title>Flow matching on a finite set: the paper's experiments</title>",
            f"<style>{_STYLE}</style>",
            "</head>",
            "<body>",
            "<main>",
            "<h1>Flow matching on a finite set: the paper's experiments</h1>",
            "<p>The experiments of Bertrand et al. 2025 (arXiv 2506.03719), repeated with nnflow. "
            "t = 0 is noise, t = 1 is data; u* is the closed-form velocity, u_theta a network's.</p>",
            f"<nav><ol>{''.join(entries)}</ol></nav>",
            *sections,
            "</main>",
            "</body>",
            "</html>",
        ]
    )
    path = folder / PAGE
    with whole_file(path) as partial:
        partial.write_text(page + "\n", encoding="utf-8")
    return path


def pictures_of(folder: Path, name: str) -> list[Path]:
    """NAME.png, then NAME-*.png and NAME-*.gif by name."""
    more = sorted(path for path in folder.glob(f"{name}-*") if path.suffix in _KINDS)
    return [path for path in (folder / f"{name}.png", *more) if path.is_file()]


def _state(folder: Path, made: Experiment) -> str:
    return "" if (folder / f"{made.name}.json").exists() else " (not made yet)"


def _section(folder: Path, made: Experiment) -> str:
    path = folder / f"{made.name}.json"
    head = f"<h2>{escape(made.title)}</h2>\n" + f'<p class="claim">{escape(made.claim)}</p>'
    why = "Not made yet"
    try:
        document = Document.open(path) if path.exists() else None
        body = "" if document is None else _figure(folder, made, document)
    except StoreError as error:
        document, why = None, f"Its results cannot be shown ({error}). Made again by"
    if document is None:
        body = f"<p>{escape(why)}: <code>{escape(made.command(folder))}</code></p>"
        return f'<section id="{escape(made.name)}" class="missing">\n{head}\n{body}\n</section>'
    lost = "".join(f"<li>{escape(line)}</li>" for line in document.missing)
    told = f"<p>Not measured:</p><ul>{lost}</ul>" if lost else ""
    return f'<section id="{escape(made.name)}">\n{head}\n{body}\n{told}\n{_table(document)}\n</section>'


def _figure(folder: Path, made: Experiment, document: Document) -> str:
    pictures = pictures_of(folder, made.name)
    caption = f"<figcaption>{escape(made.words(document))}</figcaption>"
    if not pictures:
        again = escape(f"nnflow figures {made.name} --redraw --out {shown(folder)}")
        return f"<p>Measured, but its picture is gone: <code>{again}</code></p>{caption}"
    images = "\n".join(_image(path, f"{made.title} ({path.stem})") for path in pictures)
    return f"<figure>\n{images}\n{caption}\n</figure>"


def _image(path: Path, text: str) -> str:
    try:
        content = base64.b64encode(path.read_bytes()).decode("ascii")
    except OSError as error:
        raise StoreError(f"{shown(path)}: not readable ({shown(error)}); draw it again, --redraw") from error
    return f'<img alt="{escape(text)}" src="data:{_KINDS[path.suffix]};base64,{content}">'


def _table(document: Document) -> str:
    """Settings and provenance, one value a row."""
    record = {"settings": document.settings, **document.provenance}
    rows = "".join(
        f"<tr><th scope='row'>{escape(name)}</th><td>{escape(value)}</td></tr>"
        for name, value in _flat(record)
    )
    return f"<table><caption>How it was made</caption>{rows}</table>"


def _flat(values: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, str]]:
    for name, value in values.items():
        whole = f"{above}{name}".replace("_", " ")
        if isinstance(value, Mapping):
            yield from _flat(value, f"{whole}: ")
        elif isinstance(value, list):
            yield whole, ", ".join(map(str, value))
        elif value not in (None, ""):
            yield whole, str(value)
