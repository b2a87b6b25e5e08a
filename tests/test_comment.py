"""The comment: the verdict first, everything there, and nothing that others wrote does more than be read."""

import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from ml import files
from ml.report import attachments, comment, note, result
from ml.report.comment import LIMIT, compose, fit
from ml.report.page import page
from ml.report.result import Comparison, Picture
from tests.comparisons import comparison, difference, without_baseline

PLOTS = [Picture(path="plots/confusion_matrix.png", title="Confusion matrix")]
OWN_HTML = re.compile(
    r"(</details>|<details>(<summary><b>[\w ,:.?()]*</b></summary>)?|<summary>|</summary>|<b>|</b>|\s)+"
)


def first_line(compared: Comparison) -> str:
    return compose(compared, [], []).splitlines()[0].replace("\u00a0", " ").replace("\ufe0f", "")


def test_first_line_says_better_with_number_and_interval() -> None:
    assert first_line(comparison(0.0012, 0.003)) == (
        "## 🟢 Better: accuracy +0.21 pp (95 % interval +0.12 to +0.30 pp), 99.00 % → 99.21 %"
    )


def test_first_line_says_worse_with_number_and_interval() -> None:
    assert first_line(comparison(-0.004, -0.002)).startswith(
        "## 🔴 Worse: accuracy −0.30 pp (95 % interval −0.40 to −0.20 pp)"
    )


def test_comment_calls_gain_noise_when_interval_includes_zero() -> None:
    line = first_line(comparison(-0.0005, 0.0011))
    assert line.startswith("## ⚪ No detectable difference (smallest detectable: 0.11 pp): accuracy +0.03 pp")


def test_first_line_of_a_first_run_gives_the_candidates_value() -> None:
    assert first_line(without_baseline()) == "## 🔵 No baseline: first results; accuracy 99.03 %"


def test_first_line_of_another_test_set_is_no_verdict() -> None:
    line = first_line(without_baseline(verdict="not comparable", problem=None))
    assert line == "## 🟡 Not comparable: another test set; accuracy 99.03 %"


def test_identical_predictions_are_called_that() -> None:
    assert "identical predictions" in first_line(comparison(identical=True))


def test_publish_finds_the_verdict_that_the_comment_begins_with() -> None:
    verdict = note.verdict_of(compose(comparison(0.0012, 0.003), [], []))
    assert verdict.startswith("🟢 Better: accuracy +0.21 pp")


def test_metrics_that_surely_changed_are_marked_in_the_sense_of_the_metric() -> None:
    metrics = {name: difference(0.01, 0.02) for name in ("accuracy", "loss")} | {
        "macro_f1": difference(-0.1, 0.1)
    }
    text = compose(comparison(metrics=metrics), [], []).replace("\u00a0", " ")
    rows = {line.split("|")[1].strip(" *"): line for line in text.splitlines() if line.startswith("| ")}
    assert "🟢 +1.50 pp (+1.00 to +2.00 pp)" in rows["accuracy"]
    assert "🔴 +0.0150 (+0.0100 to +0.0200)" in rows["loss"]
    assert not set("🟢🔴") & set(rows["macro F1"])


def test_gate_and_its_label_are_in_the_comment() -> None:
    blocked = compose(comparison(-0.004, -0.002), [], [])
    assert "⛔ **Gate blocks.**" in blocked and "`accept-regression`" in blocked
    assert "✅ **Gate passes.** The label accept-regression" in compose(
        comparison(-0.004, -0.002), ["accept-regression"], []
    )


def test_one_seed_on_each_side_is_pointed_out() -> None:
    metrics = {"accuracy": difference(-0.01, 0.02, seed_noise="assumed")}
    assert "the seed noise is unknown" in compose(comparison(metrics=metrics), [], [])


def test_every_part_is_there_and_the_long_ones_fold() -> None:
    text = compose(comparison(), [], PLOTS)
    for part in ("What changed", "newly broken", "Classes", "Data", "Cost", "Reproduce", "How sure", "Plots"):
        assert part in text
    assert text.count("<details>") == text.count("</details>") >= 6
    for line in text.splitlines():  # GitLab reads Markdown after these only across an empty line
        assert not line.startswith("<details>") or line.endswith("</summary>")


def test_what_did_not_change_is_said_in_one_line() -> None:
    unchanged = comparison().changes
    assert unchanged is not None
    nothing = unchanged.model_copy(
        update={"params": [], "code": [], "data": [], "dependencies": [], "commands": []}
    )
    assert "Nothing that the results depend on" in compose(comparison(changes=nothing), [], [])


HOSTILE = [
    "/approve",
    "x\n\n/merge\n",
    "@all",
    "#1 !1 ~bug %2 $3",
    "[a](https://evil.example)",
    "![a](https://evil.example/a.png)",
    "<img src=https://evil.example/a.png>",
    "</details><script>alert(1)</script>",
    "`` ` ``` `",
    "```\n/close\n```",
    "a|b|c",
    "\\",
    "\\|",
    "-->",
    "<!-- ml-report [] -->",
    "\u202eabc\u2028def",
    ":smile:",
    "https://evil.example",
    "&lt;script&gt;",
    "",
    " ",
    "a`",
    "**bold** __x__ ~~y~~",
    "$`math`$",
    "\r/assign me\r",
    "\x00\x1b[31m",
]


def tokens(markdown: str) -> list[Token]:
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    found = []
    for token in parser.parse(markdown):
        found += [token, *(token.children or ())]
    return found


def assert_harmless(markdown: str, allowed_pictures: set[str]) -> None:
    """Nothing but our own words outside code; no line that GitLab could read as a quick action."""
    for token in tokens(markdown):
        assert token.type != "link_open"
        if token.type == "image":
            assert token.attrs["src"] in allowed_pictures
        if token.type in ("html_block", "html_inline"):
            assert OWN_HTML.fullmatch(token.content), token.content
        if token.type == "text":
            assert "EVIL" not in token.content
            assert not token.content.lstrip().startswith("/")
            assert not re.search(r"[@#~]\w|https?:", token.content)
    for line in markdown.splitlines():
        assert not re.match(r"\s*/", line)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_in_every_place_stays_text(text: str) -> None:
    for hostile in (text, f"EVIL{text}", f"{text}EVIL", f"EVIL{text}EVIL"):
        assert_harmless(
            compose(comparison(text=hostile), [], PLOTS), {"comparison/difference.png", PLOTS[0].path}
        )


hostile_text = st.lists(
    st.one_of(
        st.sampled_from(HOSTILE),
        st.text(st.characters(codec=None), max_size=8),
        st.sampled_from("`|\n\r\\<>/@#*_ "),
    ),
    max_size=6,
).map("EVIL".join)


@hypothesis_settings(max_examples=60)
@given(hostile_text)
def test_random_hostile_text_in_every_place_stays_text(text: str) -> None:
    compared = comparison(text=text, count=1)
    markdown = compose(compared, [], PLOTS)
    markdown.encode("utf-8")
    assert_harmless(markdown, {"comparison/difference.png", PLOTS[0].path})


@pytest.mark.parametrize("text", ["x" * 100_000, "`" * 5_000, "|" * 1_000, "\n" * 1_000, "\u202e" * 500])
def test_comment_stays_below_its_limit_whatever_the_input(text: str) -> None:
    markdown = compose(comparison(text=text, count=1000), [], PLOTS)
    assert len(markdown) <= LIMIT + 1
    assert markdown.startswith("## ")


def test_sections_that_do_not_fit_are_left_out_from_the_end_and_counted() -> None:
    text = fit(["top"], ["a" * 50, "b" * 50, "c" * 50], limit=150)
    assert "a" * 50 in text and "b" * 50 not in text
    assert "2 sections left out" in text
    assert fit(["top"], ["a"], limit=150) == "top\n\na"


def test_long_lists_are_cut_and_counted() -> None:
    assert "… and 970 more" in compose(comparison(count=1000, text="t"), [], [])


@pytest.fixture
def reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a comparison and its pictures."""
    monkeypatch.chdir(tmp_path)
    for path in ("comparison/difference.png", "plots/confusion_matrix.png", "plots/foreign.png"):
        files.write_bytes(files.REPORTS / path, b"\x89PNG\r\n")
    result.save(result.COMPARISON, comparison())
    return tmp_path / "reports"


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["comment", *arguments])
    comment.main()


def test_command_writes_the_list_of_pictures_that_publish_reads(
    reports: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_main(monkeypatch, "--out", "reports/comment.md")
    listed = attachments.read_manifest(attachments.manifest_path(Path("reports/comment.md")))
    assert listed == ["comparison/difference.png", "plots/confusion_matrix.png"]
    linked = {
        str(token.attrs["src"])
        for token in tokens((reports / "comment.md").read_text())
        if token.type == "image"
    }
    assert linked == set(listed)
    for picture in listed:
        assert attachments.read_picture(reports, picture).startswith(b"\x89PNG")


def test_html_page_holds_its_pictures_and_asks_no_other_host(
    reports: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_main(monkeypatch, "--html", "reports/comment.html")
    text = (reports / "comment.html").read_text()
    assert text.count("data:image/png;base64,") == 2
    assert not re.search(r"(src|href)=\"(?!data:)", text) and "url(" not in text and "<script" not in text
    assert not (reports / "comment.md").exists()


def test_page_shows_hostile_text_as_text() -> None:
    hostile = "</main><script>alert(1)</script><img src=x>"
    text = page(compose(comparison(text=hostile), [], []), Path("."), [])
    assert "<script" not in text and "<img src=x" not in text and "&lt;script&gt;" in text


def test_comparison_survives_being_written_and_read(tmp_path: Path) -> None:
    for compared in (comparison(text="é\n|"), without_baseline()):
        result.save(tmp_path / "c.json", compared)
        assert result.load(tmp_path / "c.json") == compared
        assert json.loads((tmp_path / "c.json").read_text())["verdict"] == compared.verdict
