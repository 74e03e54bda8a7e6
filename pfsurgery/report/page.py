"""What stands on a page, and the page."""

from __future__ import annotations

import base64
import hashlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from pfsurgery.errors import needs
from pfsurgery.run_folder import Origin

_TITLES = {
    "finetune": "Fine-tuning",
    "sensitivity": "Sensitivity of the sites",
    "search": "Search under a budget",
    "layer": "Layer-level study",
    "nas": "Architecture search",
    "robustness": "Robustness",
}


@dataclass(frozen=True, slots=True)
class Chip:
    """A name with a square of its colour before it."""

    label: str
    color: str


Cell = str | Chip


@dataclass(frozen=True, slots=True)
class Note:
    """A paragraph; a `warning` is set off from the rest."""

    text: str
    warning: bool = False
    kind: Literal["note"] = "note"


@dataclass(frozen=True, slots=True)
class Table:
    """A table that scrolls in its own box where it is too wide.

    Attributes:
        caption: What it shows.
        columns: Names of the columns, with units.
        align: One letter a column: `l` for names, `t` for text that may wrap, `c` for code, `r` for
            numbers.
        rows: The cells.
        strong: Indices of rows that are set off.
    """

    caption: str
    columns: tuple[str, ...]
    align: str
    rows: tuple[tuple[Cell, ...], ...]
    strong: frozenset[int] = frozenset()
    kind: Literal["table"] = "table"


@dataclass(frozen=True, slots=True)
class Figure:
    """A Plotly figure.

    Attributes:
        caption: What it shows and how to read it.
        plot: The `plotly.graph_objects.Figure`; its height in pixels is in its layout.
    """

    caption: str
    plot: Any
    kind: Literal["figure"] = "figure"


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG image, embedded."""

    caption: str
    png: bytes
    kind: Literal["picture"] = "picture"

    @property
    def uri(self) -> str:
        """The image as a data URI."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


Item = Note | Table | Figure | Picture


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what stands under it."""

    title: str
    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class Content:
    """What a kind of run has to say.

    Attributes:
        lede: One or two sentences that say what came out.
        facts: The most important numbers: label and value.
        sections: All else.
    """

    lede: str
    facts: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]


def library(name: str) -> Any:
    """A module of Jinja2 or Plotly.

    Raises:
        MissingExtraError: It is not installed.
    """
    with needs("study", "A report"):
        return importlib.import_module(name)


def render(run: Origin, content: Content) -> str:
    """The page as HTML.

    All text is escaped, and the page's own policy lets no other scripts run than its two, which are
    named by their hashes, and nothing be fetched.

    Raises:
        MissingExtraError: Jinja2 or Plotly is not installed.
    """
    jinja2 = library("jinja2")
    plotly = library("plotly.offline").get_plotlyjs()
    own = _shipped("page.js")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pfsurgery.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html: str = environment.get_template("page.html.j2").render(
        run=run,
        title=_TITLES[run.kind],
        content=content,
        json_of=_json,
        css=_shipped("page.css"),
        scripts=(plotly, own),
        policy=_policy((plotly, own)),
    )
    return html


def _shipped(name: str) -> str:
    return (files("pfsurgery.report") / "templates" / name).read_text(encoding="utf-8")


def _policy(scripts: Sequence[str]) -> str:
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"
    )


def _json(plot: Any) -> str:
    """A figure as JSON that cannot end the script element in which it stands."""
    text: str = plot.to_json()
    return text.replace("<", "\\u003c")
