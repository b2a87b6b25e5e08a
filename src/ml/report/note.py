"""The text of the report note: the report, a hidden line that marks it as ours, and the history of results."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated

from markdown_it import MarkdownIt
from markdown_it.token import Token
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ml.report.escape import escape

NOTE_LIMIT = 1_000_000  # characters, GitLab's own limit
REPORT_LIMIT = 900_000  # characters; the rest is for the history, which stays below 100,000
RUNS_KEPT = 20  # results in the note: the one shown and those in the history
VERDICT_LIMIT = 200  # characters of a verdict in the history

OWN = re.compile(r"^<!-- ml-report\b", re.MULTILINE)
MARKER = re.compile(r"^<!-- ml-report (\[.*\]) -->$", re.MULTILINE)

# The picture from a third party by which CML finds its note. In a comment, no reader loads it.
WATERMARK_TITLE = "ml-report"
WATERMARK = re.compile(
    rf'!\[\]\(https://cml\.dev/watermark\.png#[0-9a-fA-F]+ "CML watermark {WATERMARK_TITLE}"\)'
)
HIDDEN_WATERMARK = re.compile(rf"^<!-- {WATERMARK.pattern} -->$", re.MULTILINE)


class Run(BaseModel):
    """One published result. Later pipelines and jobs have higher ids, so runs are ordered however late they come."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pipeline: Annotated[int, Field(ge=0)]  # 0 outside a pipeline
    job: Annotated[int, Field(ge=0)]
    time: AwareDatetime
    commit: Annotated[str, Field(pattern=r"^([0-9a-f]{40,64})?$")]
    verdict: Annotated[str, Field(max_length=VERDICT_LIMIT)]  # plain text

    @property
    def order(self) -> tuple[int, int, datetime, str, str]:
        return self.pipeline, self.job, self.time, self.commit, self.verdict


RUNS = TypeAdapter(Annotated[tuple[Run, ...], Field(min_length=1, max_length=RUNS_KEPT)])


@dataclass(frozen=True)
class Content:
    """The Markdown of the newest run, and the runs, newest first."""

    report: str
    runs: tuple[Run, ...]


def merge(contents: Iterable[Content]) -> Content:
    """The newest report and the newest RUNS_KEPT runs of all: the same for any order, grouping and repetition."""
    contents = list(contents)
    newest = max(contents, key=lambda content: (content.runs[0].order, content.report))
    runs = sorted(
        {run for content in contents for run in content.runs}, key=lambda run: run.order, reverse=True
    )
    return Content(newest.report, tuple(runs[:RUNS_KEPT]))


def render(content: Content, project_url: str, watermark: str = "") -> str:
    """The note's body: the report, the hidden watermark and line, and the earlier results as a folded table."""
    hidden = [f"<!-- {watermark} -->"] if watermark else []
    history = _history(content.runs[1:], project_url)
    return "\n\n".join([content.report, *hidden, _marker(content.runs), *history])


def is_marked(body: str) -> bool:
    """Whether it has the hidden line, even one that is not valid."""
    return OWN.search(body) is not None


def shows_watermark(body: str) -> bool:
    return WATERMARK.search(HIDDEN_WATERMARK.sub("", body)) is not None


def parse(body: str) -> Content | None:
    """What `render` was given; None for a body whose hidden line is missing or not valid, as after a hand's edit."""
    markers = list(MARKER.finditer(body))
    if not markers:
        return None
    try:
        runs = RUNS.validate_json(markers[-1][1])
    except ValidationError:
        return None
    report = HIDDEN_WATERMARK.sub("", body[: markers[-1].start()])
    return Content(report.strip("\n"), runs)


def _marker(runs: tuple[Run, ...]) -> str:
    text = RUNS.dump_json(runs).decode()
    for character in "<>-":  # none of which may be in an HTML comment as `<!--` or `-->`
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f"<!-- ml-report {text} -->"


def _history(runs: tuple[Run, ...], project_url: str) -> Iterator[str]:
    if not runs:
        return
    yield f"<details><summary>Earlier results ({len(runs)})</summary>"
    rows = "\n".join(_history_row(run, project_url) for run in runs)
    yield f"| result | commit | pipeline | time (UTC) |\n|---|---|---|---|\n{rows}"
    yield "</details>"


def _history_row(run: Run, project_url: str) -> str:
    commit = f"[{run.commit[:8]}]({project_url}/-/commit/{run.commit})" if run.commit else "–"
    pipeline = f"[{run.pipeline}]({project_url}/-/pipelines/{run.pipeline})" if run.pipeline else "–"
    verdict = escape(run.verdict, VERDICT_LIMIT)
    return f"| {verdict} | {commit} | {pipeline} | {run.time.astimezone(UTC):%Y-%m-%d %H:%M} |"


def verdict_of(report: str) -> str:
    """The plain text of the first line of the report's first heading, else paragraph, cut to VERDICT_LIMIT."""
    tokens = MarkdownIt("commonmark").parse(report)
    headings = [text for opened, text in zip(tokens, tokens[1:]) if opened.type == "heading_open"]
    first = next((token for token in [*headings, *tokens] if token.type == "inline"), None)
    return _plain(first)[:VERDICT_LIMIT] if first else ""


def _plain(inline: Token) -> str:
    words = []
    for child in inline.children or ():
        if child.type in ("softbreak", "hardbreak"):
            break
        if child.type != "html_inline":
            words.append(child.content)
    return " ".join("".join(words).split())


def quick_actions(report: str) -> Iterator[str]:
    """The lines that GitLab takes for commands such as `/merge`: those in a paragraph that start with a slash."""
    lines = report.split("\n")
    for token in MarkdownIt("commonmark").parse(report):
        if token.type == "paragraph_open" and token.map is not None:
            yield from (line for line in lines[slice(*token.map)] if re.match(r"/[A-Za-z]", line))
