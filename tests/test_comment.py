"""The comment: the verdict first, everything there, and nothing that others wrote does more than be read."""

import itertools
import json
import math
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from ml import files
from ml.errors import UserError
from ml.report import attachments, card, comment, compare, note, result
from ml.report.comment import LIMIT, compose, fit
from ml.report.page import page
from ml.report.result import (
    Changes,
    ClassResult,
    Common,
    Comparison,
    DataDifference,
    ParamChange,
    Picture,
)
from tests import test_escape
from tests.comparisons import comparison, difference, without_baseline
from tests.gitlab_emulator.rendering import effects

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
    common = Common(shared=9, only_candidate=1, only_baseline=0, relabelled=0, difference=None)
    line = first_line(without_baseline(verdict="not comparable", problem=None, common=common))
    assert line == "## 🟡 Not comparable: another test set; accuracy 99.03 %"


def test_first_line_of_renamed_classes_does_not_speak_of_another_test_set() -> None:
    line = first_line(without_baseline(verdict="not comparable", problem=None))
    assert line == "## 🟡 Not comparable: the classes have other names; accuracy 99.03 %"


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


def changed_params(*keys: str) -> Changes:
    params = [ParamChange(key=key, before="1", after="2") for key in keys]
    return Changes(params=params, code=[], data=[], dependencies=[], packages=[], commands=[])


def test_change_of_the_gates_own_rules_is_said_above_the_verdict() -> None:
    text = compose(comparison(changes=changed_params("train.epochs", "report.margin")), [], [])
    above = text.partition("\n## ")[0]
    assert above.startswith("⚠️ **This merge request changes what judges it.** The verdict below is by the")
    assert above.endswith("- The gate's rules (in force here): `report.margin` `1` → `2`\n")
    for other in ("train.epochs", "report.sheet_examples"):
        assert compose(comparison(changes=changed_params(other)), [], []).startswith("## ")


@pytest.mark.parametrize(("before", "now", "said"), [(0, 3, True), (3, 3, False), (5, 3, False)])
def test_leak_that_the_merge_request_introduces_is_said_before_anything_unfolds(
    before: int, now: int, said: bool
) -> None:
    data = DataDifference(changed=True, parts=[], in_both_parts_before=before, in_both_parts=now)
    top = compose(comparison(data=data), [], []).partition("<details>")[0]
    assert ("3 images are in both the training and the test part, before 0." in top) == said


def test_cost_says_when_there_is_nothing_to_compare_it_with() -> None:
    alone = comparison().stages[0].model_copy(update={"baseline_seconds": None})
    assert "The baseline's cost is not at hand" in compose(comparison(stages=[alone]), [], [])
    assert "not at hand" not in compose(comparison(), [], [])


def test_of_many_classes_the_clearest_are_listed() -> None:
    classes = [
        ClassResult(name=f"class{n}", examples=9, recall=difference(0.01, 0.02), p_value=p)
        for n, p in enumerate([None, *[1.0] * 40, 0.001])
    ]
    text = compose(comparison(classes=classes), [], [])
    table = text[text.index("Classes: 1 of 42 differ detectably") :]
    assert table.index("class41") < table.index("class1`") and "class0`" not in table
    assert "The clearest first:" in text and "… and 12 more" in table


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


def with_texts(compared: Comparison, texts: Iterator[str]) -> Comparison:
    """The same with the next of `texts` wherever `compared` has the text PLACE."""

    def filled(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: filled(value) for key, value in tree.items()}
        if isinstance(tree, list):
            return [filled(value) for value in tree]
        return next(texts) if tree == "PLACE" else tree

    return Comparison.model_validate(filled(compared.model_dump()))


def test_5000_hostile_values_have_no_effect_in_the_comment() -> None:
    """Figure 9: 0 quick actions, mentions, links or foreign images. Another value in each place of each comment."""
    places = comparison(text="PLACE", count=8)
    numbered = compose(with_texts(places, (f"harmless{n}x" for n in itertools.count())), [], PLOTS)
    shown = len(set(re.findall(r"harmless\d+x", numbered)))
    expected = effects(compose(with_texts(places, itertools.repeat("harmless")), [], PLOTS))
    assert shown > 100 and expected.quick_actions == expected.references == expected.links == []

    draw = random.Random(9)
    several = HOSTILE + test_escape.HOSTILE
    values = ("".join(draw.choices(several, k=draw.randint(1, 5))) for _ in itertools.count())
    for _ in range(math.ceil(5000 / shown)):
        assert effects(compose(with_texts(places, values), [], PLOTS)) == expected


@pytest.mark.parametrize("text", ["x" * 100_000, "`" * 5_000, "|" * 1_000, "\n" * 1_000, "\u202e" * 500])
def test_comment_stays_below_its_limit_whatever_the_input(text: str) -> None:
    markdown = compose(comparison(text=text, count=1000), [], PLOTS)
    assert len(markdown) <= LIMIT + 1
    assert "\n## " in markdown


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
    monkeypatch.delenv("CI_COMMIT_SHA", raising=False)
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


def test_command_refuses_the_comparison_of_another_commit(
    reports: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI_COMMIT_SHA", "e" * 40)
    with pytest.raises(UserError, match="about commit aaaaaaaa, and this job is about eeeeeeee"):
        run_main(monkeypatch)
    assert not (reports / "comment.md").exists()


def test_git_ignores_what_the_report_writes() -> None:
    ignored = (Path(__file__).parents[1] / "reports" / ".gitignore").read_text().split()
    written = [result.COMPARISON, compare.PICTURES, comment.COMMENT, card.CARD]
    written += [files.REPORTS / "comment.html", attachments.manifest_path(comment.COMMENT)]
    assert {f"/{path.name}" for path in written} <= set(ignored)


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
