"""Untrusted text in the comment: shown, and nothing else (facts/reliability.md, figure 9)."""

import itertools
import random
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from ml.report.escape import EMPTY, escape
from tests.gitlab_emulator.rendering import REFERENCES, effects

PARSER = MarkdownIt("gfm-like", {"html": True, "linkify": True})

HOSTILE = [
    *(
        "/merge",
        "\n/merge",
        "\n\n/approve\n\n",
        "x\n\n/assign @root",
        "\r/close",
        "\r\n\r\n/label ~bug",
        "\u2028/merge",
    ),
    *(
        "@root",
        "@all",
        "a@b.example",
        "#1",
        "!1",
        "g/proj#1",
        "~bug",
        '~"two words"',
        "%v1",
        "$1",
        "&1",
        "^alert#1",
    ),
    *(
        "[issue:1]",
        "[[wiki]]",
        "[^1]",
        "[^1]: note",
        ":tada:",
        "$`x`$",
        "$x$",
        "$$",
        "{+ x +}",
        "[- x -]",
        "*a*",
        "__b__",
    ),
    *(
        "http://evil.example/x",
        "HTTPS://evil.example",
        "www.evil.example",
        "ftp://evil.example",
        "mailto:a@b.example",
    ),
    *(
        "[x](http://evil.example)",
        "![x](http://evil.example/a.png)",
        "[x]: http://evil.example",
        "[x][x]",
        "<http://e.x>",
    ),
    *(
        "<img src=x onerror=alert(1)>",
        "<script>alert(1)</script>",
        "<!--",
        "-->",
        "<details>",
        "</details>",
        "</code>",
    ),
    *(
        "`",
        "``",
        "```",
        "```\n/merge\n```",
        "`\n\n/merge",
        "~~~",
        "$$\nx\n$$",
        ">>>",
        "> q",
        "# h",
        "- [ ] t",
        "---",
        "===",
    ),
    *(
        "|",
        "||",
        "\\|",
        "\\",
        "\\`",
        "|---|",
        "a | b",
        "\n| x |\n",
        "\t",
        "  ",
        " ",
        "    code",
        "\0",
        "\x1b[31m",
        "\x85",
    ),
    *(
        "\u202e",
        "\u2066",
        "\u200b",
        "\ufeff",
        "\ud800",
        "\U000e0041",
        "é",
        "字",
        "👩‍🔬",
        "&lt;img&gt;",
        "&#64;root",
        "&copy;",
    ),
    *(
        "<!-- ml-report [] -->",
        "\n<!-- ml-report [] -->\n",
        "--- \ntitle: x\n---",
        "{{x}}",
        "%{project_name}",
    ),
    *(
        "1a2b3c4",
        "0123456789abcdef0123456789abcdef01234567",
        "1a2b3c4...4d3c2b1",
        "g/proj@1a2b3c4",
        "JIRA-123",
        "GL-12",
        "#1[a.png]",
        "[vulnerability:1]",
        "[feature_flag:g/proj/1]",
        "[work_item:g/proj/1]",
        "*iteration:1",
        "&1",
        "%{commit_sha}",
    ),
    *(
        "[TOC]",
        "[[_TOC_]]",
        "::include{file=README.md}",
        "```mermaid\ngraph TD\n```",
        "```plantuml\na->b\n```",
        "```math\nx\n```",
        "```suggestion:-0+0\nx\n```",
        "> [!note]\n> x",
        "\n: a description",
        "[x] done",
        "irc://evil.example/x",
        "---\n",
        "+++\n",
    ),
]
# A code span of nothing but a colour gets a chip of that colour, see escape's docstring.
COLORS = [
    "#fff",
    "#f00f",
    "#1a2b3c",
    "#1a2b3c4d",
    "rgb(255, 0, 0)",
    "RGBA(0,0,0,0.5)",
    "hsl(120deg,100%,50%)",
]

# Every place in the comment that holds untrusted text, as Markdown around VALUE.
PLACES = {
    "running text": "The branch VALUE was trained.",
    "start of a line": "VALUE was trained.",
    "a line of its own": "Lost:\nVALUE\nnothing else.",
    "heading": "## Class VALUE",
    "list item": "- VALUE\n- second",
    "quote": "> VALUE",
    "table": "| name | value |\n|---|---|\n| VALUE | VALUE |\n|VALUE|VALUE|",
    "fold": "<details><summary>Params</summary>\n\nVALUE\n\n| a |\n|---|\n| VALUE |\n\n</details>",
}

hostile_text = st.lists(st.sampled_from(HOSTILE) | st.text(max_size=8), max_size=6).map("".join)
printable = st.characters(exclude_categories=("Cc", "Cf", "Cs", "Zl", "Zp"))


def document(values: list[str]) -> str:
    """The values, escaped, in all places in turn."""
    places = itertools.cycle(PLACES.values())
    return "\n\n".join(
        place.replace("VALUE", escape(value)) for value, place in zip(values, places, strict=False)
    )


def shown(markdown: str) -> str:
    """The text of a paragraph of nothing but code spans and the pipes between them."""
    [_, inline, _] = PARSER.parse(markdown)
    assert inline.children is not None
    for child in inline.children:
        assert child.type == "code_inline" or (
            child.type in ("text", "text_special") and set(child.content) <= {"|"}
        )
    return "".join(child.content for child in inline.children)


def cells(markdown: str) -> list[str]:
    """The source of every table cell."""
    tokens = PARSER.parse(markdown)
    return [
        after.content
        for token, after in zip(tokens, tokens[1:], strict=False)
        if token.type.endswith(("td_open"))
    ]


@settings(deadline=None)
@given(st.text(printable, min_size=1, max_size=60))
@example("`")
@example(" ` ")
@example("  ")
@example("a``b`")
@example("|`|``|")
@example("C:\\new\\`")
def test_escape_shows_printable_text_exactly(text: str) -> None:
    assert shown(escape(text)) == text


@settings(deadline=None, max_examples=50)
@given(hostile_text)
@pytest.mark.parametrize("place", PLACES)
def test_escaped_text_has_no_effect_in_any_place(place: str, text: str) -> None:
    assert effects(PLACES[place].replace("VALUE", escape(text))) == effects(
        PLACES[place].replace("VALUE", "`harmless`")
    )


@settings(deadline=None)
@given(hostile_text)
def test_escaped_text_stays_in_its_table_cell(text: str) -> None:
    row = f"| before | value | after |\n|---|---|---|\n| 1 | {escape(text)} | 2 |\n|1|{escape(text)}|2|"

    found = cells(row)

    assert [found[0], found[2], found[3], found[5]] == ["1", "2", "1", "2"]
    assert found[1] == found[4]
    assert len(found) == 6


@settings(deadline=None)
@given(hostile_text, st.integers(1, 50))
def test_escape_shows_one_visible_line_of_bounded_length(text: str, limit: int) -> None:
    escaped = escape(text, limit)

    assert not any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in escaped)
    if escaped != EMPTY:
        assert len(shown(escaped)) <= limit


def test_escape_marks_text_that_was_cut() -> None:
    assert escape("abcdef", 4) == "`abc…`"
    assert escape("abcd", 4) == "`abcd`"
    assert escape("abcdef", 4, ellipsis="..") == "`ab..`"


def test_escape_names_what_cannot_be_seen() -> None:
    assert escape("a\nb\x1b[31m\u202ec") == r"`a\nb\x1b[31m\u202ec`"


def test_escape_says_when_there_is_nothing() -> None:
    assert escape("") == EMPTY


def test_escape_refuses_a_limit_without_room_for_the_ellipsis() -> None:
    with pytest.raises(ValueError, match="limit 1 leaves no room"):
        escape("abc", 1, ellipsis="...")


def test_escape_of_a_huge_text_is_as_quick_as_of_a_long_one() -> None:
    assert len(escape("`" * 10_000_000)) < 1000


@pytest.mark.parametrize("color", COLORS)
def test_color_alone_is_shown_with_its_chip_and_nothing_else(color: str) -> None:
    assert effects(f"The class {escape(color)} was trained.").found() == {"colors": [color]}


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("around", ["{} ", " {}", "`{}`", "{};x", "{}\n", "url({})"])
def test_color_with_anything_beside_it_has_no_chip(color: str, around: str) -> None:
    assert effects(f"The class {escape(around.format(color))} was trained.").found() == {}


def test_effects_sees_what_escape_is_to_prevent() -> None:
    """The measure used here is able to fail: the same values, not escaped, do have effects."""
    found = effects("\n\n".join(HOSTILE)).found()

    assert {"quick_actions", "links", "images", "html", "references"} <= set(found)
    assert "/merge" in found["quick_actions"]
    assert "mention: @root" in found["references"]
    assert "http://evil.example/a.png" in found["images"]
    alone = [effects(value.replace("```", "\n```")) for value in HOSTILE]
    kinds = {reference.partition(": ")[0] for one in alone for reference in one.references}
    assert sorted(set(REFERENCES) - kinds) == []
    blocks = {block for one in alone for block in one.blocks}
    assert {
        "mermaid",
        "plantuml",
        "math",
        "suggestion:-0+0",
        "alert",
        "description",
        "front matter",
    } <= blocks
    commits = [commit for one in alone for commit in one.commits]
    assert {"1a2b3c4", "1a2b3c4...4d3c2b1", "g/proj@1a2b3c4"} <= set(commits)
    assert effects("- [x] done\n- [ ] not").blocks == ["task", "task"]
    assert effects("---\ntitle: x\n---\n").blocks == ["front matter"]


def test_5000_hostile_values_have_no_effect_in_any_place() -> None:
    """Figure 9, place by place; tests/test_comment.py has it for the whole comment."""
    random_values = random.Random(9)
    values = ["".join(random_values.choices(HOSTILE, k=random_values.randint(1, 5))) for _ in range(5000)]
    size = len(PLACES) * 5
    harmless = effects(document(["harmless"] * size))

    for start in range(0, len(values), size):
        batch = values[start : start + size]
        batch += ["harmless"] * (size - len(batch))
        assert effects(document(batch)) == harmless
