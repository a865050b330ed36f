"""The report as HTML: what users and datasets have written is escaped, and nothing is fetched from anywhere."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import Template

from vqa_embeddings.report.agreement import OTHER, YES_NO
from vqa_embeddings.store.run import Run

LONGEST = 400  # characters of a text that are shown

STYLE = """
:root { --ink: #1a1a1a; --soft: #5b5b5b; --line: #d9d9d9; --good: #0072b2; --bad: #d55e00; --none: #bdbdbd }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 68rem; padding: 1rem; color: var(--ink); background: #fff;
       font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0 0 .25rem } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
p { margin: .25rem 0 .75rem; max-width: 46rem } .soft { color: var(--soft); font-size: .9rem }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .75rem; margin: 1rem 0 }
.numbers div { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .75rem }
.numbers b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; line-height: 1.3 }
.strip { display: block; width: 100%; height: 2.5rem; border: 1px solid var(--line) }
.key span { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em; vertical-align: -.05em }
.key span:first-child { margin-left: 0 }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem }
th, td { text-align: right; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line);
         font-variant-numeric: tabular-nums }
td:first-child { text-align: left }
li { overflow-wrap: anywhere; margin-bottom: .4rem } ul { margin-top: 0; padding-left: 1.2rem }
.wide svg { width: 100%; max-width: 46rem; height: auto }
.maps { display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: .5rem }
.maps svg { width: 100%; height: auto }
.answers { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .75rem }
.answers article { border: 1px solid var(--line); border-left: .35rem solid var(--none); border-radius: .4rem;
                   padding: .6rem; overflow-wrap: anywhere; font-size: .92rem }
.answers .agrees { border-left-color: var(--good) } .answers .differs { border-left-color: var(--bad) }
.answers img { display: block; max-width: 100%; height: 7rem; object-fit: contain; object-position: left }
.answers p { margin: .3rem 0 }
.warning { border-left: .35rem solid var(--bad); padding: .3rem .7rem; background: #fff4ec }
@media (max-width: 50rem) { .maps { grid-template-columns: repeat(2, minmax(0, 1fr)) } }
@media print { body { max-width: none; font-size: 11pt } article, svg, tr { break-inside: avoid }
               .scroll { overflow: visible } }
"""

DOCUMENT = Template("""<!doctype html>
<!-- made from $key -->
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>$title</title>
<style>$style</style>
<body>
$body
</body>
</html>
""")


@dataclass(frozen=True)
class Failure:
    """A reason for which rows failed, and some examples of `(id, picture, message)`."""

    error: str
    count: int
    examples: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Answer:
    """A row that is shown; `agreement` is None where there is no ground truth."""

    identity: str
    image: str
    question: str
    truth: str
    answer: str
    agreement: bool | None
    thumbnail: str | None


@dataclass(frozen=True)
class Page:
    """All that the report shows.

    Attributes:
        summary: what `coverage.json` says.
        stripes: shares of rows extracted, failed and missing, from the table's beginning to its end.
        sampled: rows that were looked at.
        agreement: how many of them agree with their ground truth, differ, or have none (True, False, None).
        yes_no: counts by truth (yes, no) and answer (yes, no, other).
        warnings: what cannot be right.
        charts: SVG by section.
        no_charts: why there are none.
    """

    run: Run
    summary: Mapping[str, object]
    stripes: Sequence[tuple[float, float, float]]
    sampled: int
    agreement: Mapping[bool | None, int]
    yes_no: Sequence[Sequence[int]]
    warnings: Sequence[str]
    charts: Mapping[str, Sequence[str]]
    no_charts: str | None
    failures: Sequence[Failure]
    answers: Sequence[Answer]

    def html(self, key: str) -> str:
        """The document; `key` tells what it was made from."""
        sections = (
            self._head(),
            self._coverage(),
            self._throughput(),
            self._failures(),
            self._agreement(),
            self._states(),
            self._answers(),
        )
        title = f"{self.run.rows} rows, {self.run.model}"
        return DOCUMENT.substitute(key=key, title=_text(title), style=STYLE, body="\n".join(filter(None, sections)))

    @property
    def _of(self) -> str:
        extracted = self.summary["extracted"]
        return "all rows" if self.sampled == extracted else f"a sample of {self.sampled} of {extracted:,} rows"

    def _head(self) -> str:
        run = self.run
        numbers = [(name, self.summary[name]) for name in ("rows", "extracted", "failed", "missing")]
        boxes = "".join(f"<div><b>{count:,}</b>{name}</div>" for name, count in numbers)
        layers = ", ".join(map(str, run.layers))
        settings = f"{run.dtype}, {run.attn_implementation}, vision LoRA {run.lora}, layers {layers}"
        facts = f"{settings}, begun {run.created_at}"
        warnings = "".join(f'<p class="warning">{_text(warning)}</p>' for warning in self.warnings)
        about = f'<h1>{_text(run.model)}</h1>\n<p class="soft">{_text(facts)}</p>'
        return f'{about}\n<div class="numbers">{boxes}</div>\n{warnings}'

    def _coverage(self) -> str:
        colours = ("var(--good)", "var(--bad)", "var(--none)")
        bars = []
        for place, shares in enumerate(self.stripes):
            top = 0.0
            for share, colour in zip(shares, colours, strict=True):
                if share:
                    bars.append(f'<rect x="{place}" y="{top:.4f}" width="1" height="{share:.4f}" fill="{colour}"/>')
                top += share
        box = f'viewBox="0 0 {max(1, len(self.stripes))} 1" preserveAspectRatio="none" shape-rendering="crispEdges"'
        names = ("extracted", "failed", "missing")
        key = "".join(f'<span style="background:{c}"></span>{n}' for n, c in zip(names, colours, strict=True))
        parts = self.summary["parts"]
        assert isinstance(parts, list)
        whole = f"{len(parts)} part{' is' if len(parts) == 1 else 's are'} whole"
        if self.summary["truncated_pictures"]:
            whole += f". {self.summary['truncated_pictures']:,} of the extracted rows are on pictures that are cut off"
        return (
            f'<h2>Coverage</h2>\n<svg class="strip" role="img" aria-label="coverage" {box}>{"".join(bars)}</svg>\n'
            f'<p class="soft key">{key}; the table from its first row to its last. {whole}.</p>'
        )

    def _throughput(self) -> str:
        if "throughput" not in self.charts:
            return ""
        return f'<h2>Throughput</h2>\n<div class="wide">{self.charts["throughput"][0]}</div>'

    def _failures(self) -> str:
        if not self.failures:
            return ""
        kinds = []
        for failure in self.failures:
            examples = "".join(
                f"<li><b>{_text(identity)}</b> {_text(image)}<br>{_text(message)}</li>"
                for identity, image, message in failure.examples
            )
            rows = f"{failure.count:,} row{'s' * (failure.count > 1)}"
            kinds.append(f"<p><b>{_text(failure.error)}</b>: {rows}, such as</p>\n<ul>{examples}</ul>")
        return '<h2>Failed rows</h2>\n<p class="soft">failed.csv has them all.</p>\n' + "\n".join(kinds)

    def _agreement(self) -> str:
        agree, differ = self.agreement.get(True, 0), self.agreement.get(False, 0)
        if not agree + differ:
            return ""
        share = f"{agree / (agree + differ):.1%} of {agree + differ:,} answers agree with the ground truth"
        rule = (
            "a yes or no by the answer's first word, any other truth where it stands in the answer, word for word; "
            "of a list any, in the table the most frequent"
        )
        text = f'<h2>Agreement</h2>\n<p>{share}; of {self._of}. <span class="soft">Compared: {rule}.</span></p>'
        if not any(map(sum, self.yes_no)):
            return text
        rows = [(f"truth {truth}", *map(str, counts)) for truth, counts in zip(YES_NO, self.yes_no, strict=True)]
        return text + "\n" + _table(["", *(f"answer {name}" for name in (*YES_NO, OTHER))], rows)

    def _answers(self) -> str:
        if not self.answers:
            return ""
        note = ""
        if not any(answer.thumbnail for answer in self.answers):
            where = f"cannot be read here in {self.run.images_dir}" if self.run.images_dir else "were not recorded"
            note = f'\n<p class="soft">Without pictures, which {_text(where)}.</p>'
        return f'<h2>Answers</h2>{note}\n<div class="answers">{"".join(map(_article, self.answers))}</div>'

    def _states(self) -> str:
        if self.no_charts:
            return f"<h2>States</h2>\n<p>There are no charts here: {_text(self.no_charts)}.</p>"
        if "norms" not in self.charts:
            return ""
        colours = (("agrees with the truth", "var(--good)"), ("differs", "var(--bad)"), ("no truth", "#999"))
        key = "".join(f'<span style="background:{colour}"></span>{name}' for name, colour in colours)
        titles = {"query_token": "States at the last prompt token", "vision_token": "States at the last image token"}
        maps = "".join(
            f'<h2>{title}</h2>\n<div class="maps">{"".join(self.charts[name])}</div>\n'
            for name, title in titles.items()
        )
        about = "the line is the median row, nine tenths lie in the band; the last layer is taken after the final norm"
        return (
            f'<h2>Norms by layer</h2>\n<p class="soft">Of {self._of}: {about}.</p>\n'
            f'<div class="wide">{self.charts["norms"][0]}</div>\n'
            f'{maps}<p class="soft key">{key}. Each point is a row, at its first two principal components.</p>'
        )


def _article(answer: Answer) -> str:
    kind = {True: "agrees", False: "differs", None: "unknown"}[answer.agreement]
    picture = f'<img src="{answer.thumbnail}" alt="">' if answer.thumbnail else ""
    truth = f"<p><b>truth</b> {_text(answer.truth)}</p>" if answer.truth else ""
    return (
        f'<article class="{kind}">{picture}<p>{_text(answer.question)}</p>{truth}'
        f"<p><b>answer</b> {_text(answer.answer)}</p>"
        f'<p class="soft">{_text(answer.identity)}, {_text(answer.image)}</p></article>'
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of numbers with a name before each line."""

    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line("td", row) for row in rows)
    return f'<div class="scroll"><table>\n{line("th", heads)}\n{body}\n</table></div>'


def _text(text: str) -> str:
    """A text for HTML, shortened where it is very long. Control characters, which HTML has no place for, are shown."""
    if len(text) > LONGEST:
        text = text[:LONGEST] + "…"
    return html.escape("".join(map(_shown, text)))


def _shown(character: str) -> str:
    if character in "\n\r\t":
        return " "
    return character if character.isprintable() else "\ufffd"
