"""A note as a person sees it at GitLab: HTML, and everything in it that does more than show text.

markdown-it-py with tables, strikethrough, autolinks and raw HTML stands for GitLab's parser (comrak); the reference
patterns are those of doc/user/markdown.md "GitLab-specific references". As in GitLab's Banzai filters, text inside
`code`, `pre` and `a` refers to nothing.
"""

import re
from dataclasses import asdict, dataclass, field
from html.parser import HTMLParser

from markdown_it import MarkdownIt

from tests.gitlab_emulator.quick_actions import extract

MARKDOWN = MarkdownIt("gfm-like", {"html": True, "linkify": True})

REFERENCES = {
    "mention": r"(?<![\w/@`])@@?[\w][\w.\-/]*",
    "issue": r"(?<![\w`])[\w./-]*#\d+\b",
    "merge request": r"(?<![\w`])[\w./-]*!\d+\b",
    "snippet": r"(?<![\w$])\$\d+\b",
    "label": r'(?<![\w~])~(?:\d+\b|"[^"]+"|[A-Za-z_][\w:.?&-]*)',
    "milestone": r'(?<![\w%])%(?:\d+\b|"[^"]+"|[A-Za-z_][\w.-]*)',
    "epic": r"(?<![\w&])&\d+\b",
    "alert": r"\^alert#\d+\b",
    "bracketed": r"\[(?:issue|work_item|epic|vulnerability|feature_flag|cadence|contact|wiki_page):[^\]]+\]",
    "iteration": r"\*iteration:\S+",
    "wiki": r"\[\[[^\]]+\]\]",
    "emoji": r":[a-z0-9_+\-]+:",
    "math": r"\$[^\s$](?:[^$]*[^\s$])?\$",
    "footnote": r"\[\^[^\]\s]+\]",
    "inline diff": r"\{\+.*?\+\}|\[\+.*?\+\]|\{-.*?-\}|\[-.*?-\]",
    "url": r"(?i)\b(?:https?|ftp)://\S|\bwww\.\S",
}


@dataclass(frozen=True)
class Effects:
    """What a note does beyond showing text; empty for harmless text."""

    quick_actions: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    html: list[str] = field(default_factory=list)  # tags that the author wrote
    references: list[str] = field(
        default_factory=list
    )  # mentions, issues, labels, emoji, math, … outside code

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
        self._quiet = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "a" and values.get("href") is not None:
            self.links.append(values["href"] or "")
        if tag == "img":
            self.images.append(values.get("src") or "")
        self._quiet += tag in self.QUIET
        self.text.append("" if self._quiet else "\0" if tag in ("p", "td", "th", "li", "br") else "")

    def handle_endtag(self, tag: str) -> None:
        self._quiet -= tag in self.QUIET and self._quiet > 0

    def handle_data(self, data: str) -> None:
        self.text.append("\0" if self._quiet else data)


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
    )


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
