"""The report as an HTML page. What users and data sets have written is escaped, and nothing is fetched."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vqa_embeddings.report.agreement import OTHER, YES_NO
from vqa_embeddings.schema import find
from vqa_embeddings.store.run import Run
from vqa_embeddings.store.self_check import SelfCheck

TEMPLATES = Path(__file__).parent / "templates"
GIB = 1 << 30
LONGEST = 400  # characters of a text that are shown
ROW_COLOURS = {"extracted": "var(--good)", "failed": "var(--bad)", "missing": "var(--none)"}


@dataclass(frozen=True)
class FailureGroup:
    """A reason for which rows failed, and some examples of `(id, picture, message)`."""

    error: str
    count: int
    examples: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class ShownAnswer:
    """A row that is shown; `agreement` is None where there is no ground truth."""

    identity: str
    image: str
    question: str
    truth: str
    answer: str
    agreement: bool | None
    thumbnail: str | None


@dataclass(frozen=True)
class Bar:
    """One colour of one stripe of the coverage strip, which is 1 high; `top` and `height` are shares of it."""

    stripe: int
    top: float
    height: float
    colour: str


@dataclass(frozen=True)
class Page:
    """All that the report shows.

    Attributes:
        summary: the contents of `coverage.json`.
        stripes: shares of rows extracted, failed and missing, from the table's beginning to its end.
        sampled: rows that were looked at.
        agreement: how many of them agree with their ground truth, differ, or have none (True, False, None).
        yes_no: counts by truth (yes, no) and answer (yes, no, other).
        self_check: how the run's last one came out; None where there was none.
        warnings: what cannot be right.
        charts: SVG by section.
        no_charts: why there are none.
    """

    run: Run
    summary: Mapping[str, Any]
    stripes: Sequence[tuple[float, float, float]]
    sampled: int
    agreement: Mapping[bool | None, int]
    yes_no: Sequence[Sequence[int]]
    self_check: SelfCheck | None
    warnings: Sequence[str]
    charts: Mapping[str, Sequence[str]]
    no_charts: str | None
    failures: Sequence[FailureGroup]
    answers: Sequence[ShownAnswer]

    @property
    def title(self) -> str:
        """The document's title."""
        return f"{self.run.rows} rows, {self.run.model}"

    @property
    def settings(self) -> str:
        """The settings that the vectors depend on."""
        run = self.run
        layers = ", ".join(map(str, run.layers))
        adapter = f"LoRA {run.lora}, " if run.lora else ""
        settings = f"{run.dtype}, {run.attn_implementation}, {adapter}layers {layers}"
        return f"{settings}, begun {run.created_at}"

    @property
    def looked_at(self) -> str:
        """How many of the extracted rows the charts and the agreement are about."""
        extracted = self.summary["extracted"]
        return "all rows" if self.sampled == extracted else f"a sample of {self.sampled} of {extracted:,} rows"

    @property
    def agreed(self) -> int:
        """How many answers agree with their ground truth."""
        return self.agreement.get(True, 0)

    @property
    def compared(self) -> int:
        """How many answers have a ground truth."""
        return self.agreed + self.agreement.get(False, 0)

    @property
    def why_no_pictures(self) -> str | None:
        """Why no answer has a picture; None where one has."""
        if any(answer.thumbnail for answer in self.answers):
            return None
        return f"cannot be read here in {self.run.images_dir}" if self.run.images_dir else "were not recorded"

    def devices(self) -> Iterator[tuple[str, ...]]:
        """Of each kind of device: its name, ranks, rows, rows a second of one rank, and the most memory of one."""
        for one in self.summary["devices"]:
            rate, memory = one["rows_per_second"], one["peak_memory"]
            speed, used = f"{rate:.3g}" if rate else "", f"{memory / GIB:.1f} GiB" if memory else ""
            yield one["device"], f"{one['ranks']:,}", f"{one['rows']:,}", speed, used

    def bars(self) -> Iterator[Bar]:
        """The strip of the coverage, stripe by stripe, each from top to bottom."""
        for number, shares in enumerate(self.stripes):
            top = 0.0
            for share, colour in zip(shares, ROW_COLOURS.values(), strict=True):
                if share:
                    yield Bar(number, top, share, colour)
                top += share

    def maps(self) -> Iterator[tuple[str, Sequence[str]]]:
        """Of each vector whose states are drawn, what it belongs to, and a chart for each layer; questions first."""
        known = ((vector, charts) for name, charts in self.charts.items() if (vector := find(name)))
        return ((vector.place, charts) for vector, charts in sorted(known, key=lambda pair: pair[0].per_picture))

    def yes_no_rows(self) -> Iterable[tuple[str, Sequence[int]]]:
        """For each truth, how often the answers were yes, no, and something else."""
        return zip(YES_NO, self.yes_no, strict=True)


def render(page: Page, key: str) -> str:
    """The HTML document; `key` tells from what it was made."""
    template = _environment().get_template("report.html")
    return template.render(page=page, key=key, row_colours=ROW_COLOURS, answer_kinds=(*YES_NO, OTHER))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"text": _text, "thousands": "{:,}".format, "percent": "{:.1%}".format}
    return environment


def _text(text: str) -> Markup:
    """A text for HTML, shortened where it is very long. Control characters, which HTML has no place for, are shown."""
    if len(text) > LONGEST:
        text = text[:LONGEST] + "…"
    return Markup(html.escape("".join(map(_printable, text))))


def _printable(character: str) -> str:
    if character in "\n\r\t":
        return " "
    return character if character.isprintable() else "\ufffd"
