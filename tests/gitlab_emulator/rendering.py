"""A note as a person sees it at GitLab: HTML, and everything in it that does more than show text.

markdown-it-py with tables, strikethrough, autolinks and raw HTML stands for GitLab's parser (comrak, with the options of
Banzai::Filter::MarkdownEngines::GlfmMarkdown). The reference patterns are those of doc/user/markdown.md and of the
`reference_pattern`s of app/models and ee/app/models; a reference counts whether or not what it names is there.

| in GitLab | here |
|---|---|
| reference filters, emoji, inline diff, autolinks: text inside `code`, `pre`, `a` refers to nothing (IGNORE_PARENTS) | `references` |
| ColorFilter: a code span of nothing but a colour gets a chip of it | `colors` |
| mermaid, PlantUML, Kroki, math, JSON tables, suggestions: code blocks of a language | `blocks` |
| FrontMatterFilter, alerts, multi-line quotes, tables of contents, task lists, description lists | `blocks` |
| IncludeFilter (`::include{file=…}`): wikis and files only, not notes | nothing |
| PlaceholdersPostFilter (`%{project_name}`) | `references` |
"""

import re
from dataclasses import asdict, dataclass, field
from html.parser import HTMLParser

from markdown_it import MarkdownIt

from tests.gitlab_emulator.quick_actions import extract

MARKDOWN = MarkdownIt("gfm-like", {"html": True, "linkify": True})

_PROJECT = r"(?:[\w.\-]+(?:/[\w.\-]+)*)?"
_SHA = r"[0-9a-f]{7,40}"
REFERENCES = {
    "mention": r"(?<![\w/@`])@@?[\w][\w.\-/]*",
    "issue": r"(?<![\w`])[\w./-]*#\d+\b",
    "issue by prefix": r"(?<!\w)GL-\d+\b",
    "design": r"#\d+\[[^\]]+\]|#\d+/designs\b",
    "merge request": r"(?<![\w`])[\w./-]*!\d+\b",
    "snippet": r"(?<![\w$])\$\d+\b",
    "label": r'(?<![\w~])~(?:\d+\b|"[^"]+"|[A-Za-z_][\w:.?&-]*)',
    "milestone": r'(?<![\w%])%(?:\d+\b|"[^"]+"|[A-Za-z_][\w.-]*)',
    "epic": r"(?<![\w&])&\d+\b",
    "alert": r"\^alert#\d+\b",
    "bracketed": (
        r"\[(?:issue|work_item|epic|vulnerability|feature_flag|cadence|contact|contacts|wiki_page|iteration|milestone"
        r"|merge_request|snippet|design|alert):[^\]]+\]"
    ),
    "iteration": r"\*iteration:\S+",
    "external issue": r"(?<![\w-])[A-Z][A-Z0-9_]+-\d+\b",
    "placeholder": r"%\{[a-z_]+\}",
    "wiki": r"\[\[[^\]]+\]\]",
    "emoji": r":[a-z0-9_+\-]+:",
    # "\0" stands for code
    "math": r"\$[^\s$](?:[^$]*[^\s$])?\$|\$\0+\$|\$\$[^$]+\$\$",
    "footnote": r"\[\^[^\]\s]+\]",
    "inline diff": r"\{\+.*?\+\}|\[\+.*?\+\]|\{-.*?-\}|\[-.*?-\]",
    "url": r"(?i)\b(?:[a-z][a-z0-9+.\-]*)://\S|\bwww\.\S",
    "email": r"[\w.+-]+@[\w-]+\.[\w.-]*\w",
    "table of contents": r"(?i)\[TOC\]|\[\[_TOC_\]\]",
}
COMMIT = re.compile(rf"(?<![\w./@-])(?:{_PROJECT}@)?{_SHA}(?:\.{{2,3}}{_SHA})?(?![\w-])")
# Languages of code blocks that are drawn or applied: doc/user/markdown.md, doc/administration/integration/kroki.md.
DRAWN = frozenset(
    """mermaid plantuml math geojson topojson stl json:table suggestion actdiag blockdiag bpmn bytefield c4plantuml d2
dbml diagramsnet ditaa dot erd excalidraw graphviz nomnoml nwdiag packetdiag pikchr rackdiag seqdiag structurizr svgbob
symbolator tikz umlet vega vegalite wavedrom wireviz""".split()
)
# Gitlab's Banzai::ColorParser, in words: #rgb, #rgba, #rrggbb, #rrggbbaa, rgb(…), rgba(…), hsl(…), hsla(…).
_NUMBER = r"-?\d*\.?\d+(?:%|deg|rad)?"
COLOR = re.compile(
    rf"#(?:[0-9a-f]{{3,4}}|[0-9a-f]{{6}}|[0-9a-f]{{8}})|(?:rgb|hsl)a?\({_NUMBER}(?:,\s*{_NUMBER}){{2,3}}\)",
    re.IGNORECASE,
)
# At the start of a line, with markdown's indentation of at most three blanks, after list and quote marks.
_LINE_BLOCKS = {
    "alert": re.compile(
        r"^[ >]*> ?\[!(?:note|tip|important|caution|warning)\]", re.IGNORECASE | re.MULTILINE
    ),
    "quote": re.compile(r"^ {0,3}>>>\s*$", re.MULTILINE),
    "front matter": re.compile(r"\A(?:---|\+\+\+|;;;)\s*\n"),
    "description": re.compile(r"^ {0,3}: \S", re.MULTILINE),
}


@dataclass(frozen=True)
class Effects:
    """What a note does beyond showing text; empty for harmless text."""

    quick_actions: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    html: list[str] = field(default_factory=list)  # tags that the author wrote
    # mentions, issues, commits, labels, emoji, math, … outside code
    references: list[str] = field(default_factory=list)
    # hashes and ranges outside code: GitLab links those it knows
    commits: list[str] = field(default_factory=list)
    colors: list[str] = field(default_factory=list)  # in code spans: a chip of the colour stands beside it
    blocks: list[str] = field(default_factory=list)  # diagrams, alerts, task items, …

    def found(self) -> dict[str, list[str]]:
        return {name: values for name, values in asdict(self).items() if values}


class _Reader(HTMLParser):
    """Collects links, images and the text that stands outside code and links."""

    QUIET = ("code", "pre", "a", "style", "script")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.links: list[str] = []
        self.images: list[str] = []
        self.text: list[str] = []
        self.codes: list[str] = []  # of code spans
        self._quiet = self._pre = 0
        self._in_code = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "a" and values.get("href") is not None:
            self.links.append(values["href"] or "")
        if tag == "img":
            self.images.append(values.get("src") or "")
        self._pre += tag == "pre"
        if tag == "code" and not self._pre:
            self.codes.append("")
            self._in_code = True
        self._quiet += tag in self.QUIET
        self.text.append("" if self._quiet else "\0" if tag in ("p", "td", "th", "li", "br") else "")

    def handle_endtag(self, tag: str) -> None:
        self._pre -= tag == "pre"
        self._in_code = self._in_code and tag != "code"
        self._quiet -= tag in self.QUIET and self._quiet > 0

    def handle_data(self, data: str) -> None:
        self.text.append("\0" if self._quiet else data)
        if self._in_code:
            self.codes[-1] += data


def effects(body: str) -> Effects:
    """Everything in the note that is not text, for a test to compare with what should be there."""
    _, commands = extract(body)
    reader = _Reader()
    reader.feed(MARKDOWN.render(body))
    reader.close()
    text = "".join(reader.text)
    references = [f"{kind}: {hit[0]}" for kind, form in REFERENCES.items() for hit in re.finditer(form, text)]
    return Effects(
        quick_actions=[f"/{command} {argument}".strip() for command, argument in commands],
        links=reader.links,
        images=reader.images,
        html=_written_html(body),
        references=references,
        commits=COMMIT.findall(text),
        colors=[code for code in reader.codes if COLOR.fullmatch(code)],
        blocks=_blocks(body),
    )


def _blocks(body: str) -> list[str]:
    """Code blocks that are drawn, task items, and blocks that start by a mark of their own outside code."""
    tokens = MARKDOWN.parse(body)
    languages = [
        token.info.split()[0].lower() for token in tokens if token.type == "fence" and token.info.strip()
    ]
    found = [known for known in languages if known in DRAWN or known.startswith("suggestion:")]
    for before, token in zip(tokens, tokens[2:], strict=False):
        if before.type == "list_item_open" and re.match(r"\[[ xX~]\]\s", token.content):
            found.append("task")
    lines = body.split("\n")
    for token in tokens:
        if token.type in ("fence", "code_block") and token.map is not None:
            lines[slice(*token.map)] = [""] * (token.map[1] - token.map[0])
    outside = "\n".join(lines)
    return found + [name for name, form in _LINE_BLOCKS.items() if form.search(outside)]


def _written_html(body: str) -> list[str]:
    """Raw HTML in the note's source, comments aside."""
    written = []
    for block in MARKDOWN.parse(body):
        for token in (block, *(block.children or ())):
            if token.type in ("html_block", "html_inline"):
                written.append(re.sub(r"<!--.*?-->", "", token.content, flags=re.DOTALL).strip())
    return [html for html in written if html]


def render(body: str, project_id: int) -> str:
    """The note's HTML, with the addresses of uploads made absolute as GitLab's UploadLinkFilter does."""
    html = MARKDOWN.render(body)
    return re.sub(r'\b(src|href)="/uploads/', rf'\1="/-/project/{project_id}/uploads/', html)
