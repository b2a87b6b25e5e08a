"""Untrusted text in Markdown: params, labels, file names, commit titles and whatever else others may choose."""

import re
import unicodedata

# Cc control, Cf format (bidi overrides, zero width), Cs lone surrogates, Zl and Zp line and paragraph separators.
INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
EMPTY = "*(empty)*"


def escape(text: str, limit: int = 200, ellipsis: str = "…") -> str:
    """Markdown that shows `text` on one line as code and does nothing else, at most `limit` characters shown.

    For running text, list items, table cells and the Markdown inside a fold. It is a code span, which GitLab
    leaves alone when it looks for quick actions, mentions, commits, references, links, math and emoji; a text that is
    nothing but a colour (`#fff`, `rgb(…)`) gets a square of it at its side, which tells nothing that the text does
    not. Its fence is longer than any run of backticks in the text. A pipe would end a table cell even inside a code
    span, and its escape `\\|` would show a backslash outside tables, so a pipe stands between two spans as an entity,
    right in both.
    Invisible characters and line ends are shown as `\\n`, `\\x1b`, `\\u202e`; longer text ends in `ellipsis`.

    Not for a line of raw HTML such as `<summary>…</summary>`, where Markdown is not read; and two results need at
    least one character between them, or their fences become one.
    """
    if limit < len(ellipsis):
        raise ValueError(f"limit {limit} leaves no room for the ellipsis {ellipsis!r}")
    shown = "".join(map(_visible, text[: limit + 1]))
    if len(shown) > limit:
        shown = shown[: limit - len(ellipsis)] + ellipsis
    if not shown:
        return EMPTY
    return "&#124;".join(_code_span(part) if part else "" for part in shown.split("|"))


def _visible(character: str) -> str:
    if unicodedata.category(character) not in INVISIBLE:
        return character
    return character.encode("unicode_escape").decode("ascii")


def _code_span(text: str) -> str:
    """A CommonMark code span of `text`, which is one line and not empty, with every space and backtick kept."""
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    touches_fence = text.startswith("`") or text.endswith("`")
    would_be_stripped = text.startswith(" ") and text.endswith(" ") and text.strip(" ") != ""
    padding = " " if touches_fence or would_be_stripped else ""
    return f"{fence}{padding}{text}{padding}{fence}"
