"""The merge request's comment as Markdown, from reports/comparison.json: the verdict first, long parts folded.

    python -m ml.report.comment --out reports/comment.md       also writes reports/comment.pictures.json
    python -m ml.report.comment --html reports/comment.html    the same as a page, for the author's own eyes

Whatever params, data and file names say goes through `escape`. Sections are left out, the last first, until the
comment has at most LIMIT characters.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ml import files
from ml.errors import exit_on_user_error
from ml.report.attachments import COMMENT, manifest_path
from ml.report import result
from ml.report.escape import escape
from ml.report.gate import LABEL, decide
from ml.report.page import page
from ml.report.result import (
    COMPARISON,
    IN_FORCE,
    Comparison,
    DataDifference,
    FileChange,
    Flip,
    FlipCount,
    Judge,
    PartDifference,
    Picture,
    StageResult,
    clearness,
    improvement,
)
from ml.report.statistics import Difference
from ml.report.words import (
    COUNTED,
    NO_BREAK,
    amount,
    change,
    duration,
    interval,
    p_equals,
    p_value,
    plural,
    title,
    value,
)
from ml.settings import load_settings

LIMIT = 60_000  # characters; GitLab's own limit is 1,000,000, and publish adds the history
ROWS = 30  # of one table or list; the rest is counted
VALUE = 80  # characters of one untrusted value

SIGNS = {
    "better": "🟢 Better",
    "worse": "🔴 Worse",
    "no detectable difference": "⚪\ufe0f No detectable difference",
    "not comparable": "🟡 Not comparable",
    "no baseline": "🔵 No baseline",
}
STAGE_PLOTS = {
    "training_curves": "Training curves",
    "confusion_matrix": "Confusion matrix",
    "per_class": "Recall and precision per class",
    "reliability": "Calibration",
    "worst_mistakes": "Worst mistakes",
}


@dataclass(frozen=True)
class Section:
    """Markdown blocks; folded under its title where it has one to unfold."""

    title: str  # plain text that this module wrote
    blocks: list[str]
    folded: bool = True

    def markdown(self) -> str:
        body = "\n\n".join(self.blocks)
        if not self.folded:
            return f"### {self.title}\n\n{body}"
        return f"<details><summary><b>{self.title}</b></summary>\n\n{body}\n\n</details>"


def compose(comparison: Comparison, labels: list[str], plots: list[Picture]) -> str:
    """The whole comment; `plots` are the stages' own pictures."""
    top = [*judge_block(comparison), headline(comparison), *opening(comparison, labels)]
    makers: list[Callable[[], Section | None]] = [
        lambda: changes_section(comparison),
        lambda: examples_section(comparison),
        lambda: classes_section(comparison),
        lambda: data_section(comparison.data),
        lambda: cost_section(comparison.stages),
        lambda: reproduce_section(comparison),
        lambda: certainty_section(comparison),
        lambda: plots_section(plots),
    ]
    sections = [section.markdown() for section in (make() for make in makers) if section]
    return fit(top, sections) + "\n"


def fit(top: list[str], sections: list[str], limit: int = LIMIT) -> str:
    """Leave out sections from the last on until the text has at most `limit` characters, and say so."""
    for kept in range(len(sections), -1, -1):
        left_out = len(sections) - kept
        note = (
            [f"*{plural(left_out, 'section')} left out: the comment would be too long.*"] if left_out else []
        )
        text = "\n\n".join([*top, *sections[:kept], *note])
        if len(text) <= limit:
            return text
    return text


# ---- The part that everybody reads -----------------------------------------------------------------------------


def judge_block(comparison: Comparison) -> list[str]:
    """Above the verdict: what the merge request changes of its own judge, and which code judged."""
    judge, changes = comparison.judge, comparison.changes
    lines = [
        f"- The gate's rules{IN_FORCE}: {escape(each.key, VALUE)} {optional(each.before)} → {optional(each.after)}"
        for each in (changes.params if changes else [])
        if is_rule(each.key)
    ]
    lines += [file_line(part.part, each) for part in (judge.touched if judge else []) for each in part.files]
    if not lines:
        return []
    told = f"{judged(comparison, judge)} " if judge else ""
    return [
        f"⚠️ **This merge request changes what judges it.** {told}What is *in force here* had its say in it already, and "
        "once merged all of it judges everybody: read it.",
        bullets(lines),
    ]


def judged(comparison: Comparison, judge: Judge) -> str:
    made = comparison.reproduce
    baseline = f" ({made.baseline_commit[:8]})" if made.baseline_commit else ""
    image = f" in the image {escape(judge.image)}" if judge.image else ""
    return {
        "baseline": f"The verdict below is by the target branch's own code{baseline}{image}, not by this change.",
        "candidate": f"**The verdict below is by the changed code itself**{image}: it is worth what the change is worth.",
        "both": f"The verdict below is by code that both sides have{image}.",
        "other": f"The verdict below is by code of another version than both sides'{image}.",
        "unknown": f"The verdict below is by the installed package{image}.",
    }[judge.code]


def headline(comparison: Comparison) -> str:
    """## 🟢 Better: accuracy +0.21 pp (95 % interval +0.12 to +0.30 pp), 99.20 % → 99.41 %"""
    metric, primary = comparison.primary_metric, comparison.primary
    now = value(metric, comparison.candidate[metric].mean)
    if primary is None:
        what = "the classes have other names" if renamed_classes(comparison) else WHAT[comparison.problem]
        return f"## {SIGNS[comparison.verdict]}: {what}; {title(metric)} {now}"
    sign = SIGNS[comparison.verdict]
    if comparison.identical:
        return f"## {sign}: identical predictions, {title(metric)} {now}"
    if comparison.verdict == "no detectable difference":
        sign += f" (smallest detectable: {amount(metric, primary.smallest_detectable)})"
    moved = f"{value(metric, primary.baseline)} → {now}"
    bounds = f"95 % interval {interval(metric, primary.low, primary.high)}"
    return f"## {sign}: {title(metric)} {change(metric, primary.difference)} ({bounds}), {moved}"


WHAT: dict[str | None, str] = {
    None: "another test set",
    "first_run": "first results",
    "not_stored": "its results were not pushed",
    "unreachable": "its results could not be fetched",
    "corrupt": "its results are damaged",
}


def renamed_classes(comparison: Comparison) -> bool:
    """Whether that is why the results cannot be compared: another test set would be described in `common`."""
    return comparison.verdict == "not comparable" and comparison.common is None


def opening(comparison: Comparison, labels: list[str]) -> list[str]:
    """Why, what the gate does, what was compared, the metrics, and the one picture."""
    decision = decide(comparison, labels)
    blocks = [comparison.reason + (f" Found: {escape(comparison.detail, 300)}" if comparison.detail else "")]
    if decision.passes:
        blocks.append(f"✅ **Gate passes.** {decision.reason}")
    else:
        blocks.append(
            f"⛔ **Gate blocks.** {decision.reason} The label `{LABEL}` and a new pipeline let it through."
        )
    blocks += warnings(comparison)
    blocks.append(subject(comparison))
    blocks.append(metrics_table(comparison))
    primary = comparison.primary
    if primary and primary.seed_noise in SEED_NOISE:
        blocks.append(f"⚠️ {SEED_NOISE[primary.seed_noise]}")
    blocks += [f"⚠️ {note.text}: {escape(note.detail, 300)}" for note in comparison.notes]
    return blocks + images(comparison, "difference")


def warnings(comparison: Comparison) -> list[str]:
    """What a reviewer has to know before believing the verdict, whatever it is."""
    found = []
    data = comparison.data
    if data and data.in_both_parts is not None and data.in_both_parts > (data.in_both_parts_before or 0):
        are = f"{plural(data.in_both_parts, 'image')} {'is' if data.in_both_parts == 1 else 'are'}"
        found.append(
            f"⚠️ With this merge request, {are} in both the training and the test part, before "
            f"{data.in_both_parts_before or 0:,}. The test examples among them measure memory."
        )
    return found


def is_rule(key: str) -> bool:
    """Of the keys in params.yaml; report.sheet_examples is about looks."""
    return key.startswith("report.") and key != "report.sheet_examples"


SEED_NOISE = {
    "borrowed": "One side has a single seed, so its seed noise is taken to be that of the other side.",
    "assumed": "Each side has a single seed, so the seed noise is unknown and `report.assumed_seed_std` stands in for it. "
    "Other metrics' intervals know the test examples' noise alone. Give `train.seeds` three or more.",
}


def subject(comparison: Comparison) -> str:
    """Candidate 0123abcd (5 seeds) against baseline 4567cdef (5 seeds) on 10,000 test examples."""
    made = comparison.reproduce
    own = f"Candidate {made.commit[:8]}{' with uncommitted changes' if made.dirty else ''}"
    text = f"{own} ({plural(len(comparison.candidate_seeds), 'seed')})"
    if comparison.baseline_seeds:
        other = made.baseline_commit[:8] if made.baseline_commit else ""
        text += f" against baseline {other} ({plural(len(comparison.baseline_seeds), 'seed')})"
    paired = ", the same ones on both sides, paired one by one" if comparison.metrics else ""
    return f"{text}, on {comparison.test_examples:,} test examples{paired}."


def metrics_table(comparison: Comparison) -> str:
    if not comparison.metrics:
        return candidate_table(comparison)
    rows = [
        f"| {strong(title(metric), metric == comparison.primary_metric)} | {value(metric, each.baseline)} "
        f"| {value(metric, each.candidate)} | {marked(metric, each)} |"
        for metric, each in comparison.metrics.items()
    ]
    head = "| metric | baseline | candidate | difference (95 % interval) |\n|---|---:|---:|:---|"
    return "\n".join([head, *rows])


def marked(metric: str, difference: Difference) -> str:
    """🔴 +0.0078 (+0.0020 to +0.0176): marked where the interval does not include zero; breaks into two lines at most."""
    certain = difference.seed_noise != "unknown" and (difference.low > 0 or difference.high < 0)
    mark = ("🟢 " if improvement(metric, difference.difference) > 0 else "🔴 ") if certain else ""
    moved = f"{mark}{change(metric, difference.difference)}".replace(" ", NO_BREAK)
    return f"{moved} ({interval(metric, difference.low, difference.high)})"


def candidate_table(comparison: Comparison) -> str:
    rows = []
    for metric, each in comparison.candidate.items():
        bounds = comparison.candidate_intervals.get(metric)
        shown = f"{value(metric, bounds.low)} to {value(metric, bounds.high)}" if bounds else "–"
        old = comparison.baseline.get(metric)
        rows.append(
            f"| {strong(title(metric), metric == comparison.primary_metric)} | {value(metric, each.mean)} | {shown} "
            f"| {value(metric, old.mean) if old else '–'} |"
        )
    head = "| metric | candidate | 95 % interval (examples) | baseline, on its own test set |\n|---|---:|---|---:|"
    return "\n".join([head, *rows])


def strong(text: str, yes: bool) -> str:
    return f"**{text}**" if yes else text


def images(comparison: Comparison, *names: str) -> list[str]:
    """The comparison's pictures of these names, in this order, as far as they were drawn."""
    by_name = {Path(picture.path).stem: picture for picture in comparison.pictures}
    return [f"![{by_name[name].title}]({by_name[name].path})" for name in names if name in by_name]


# ---- The folded parts ------------------------------------------------------------------------------------------


def changes_section(comparison: Comparison) -> Section | None:
    changes = comparison.changes
    if changes is None:
        return None
    if not changes.any:
        same = "Nothing that the results depend on: same code, params, data and packages."
        if comparison.judge and comparison.judge.touched:
            same = "The code, params, data and packages of the stages are the same; what judges them is not (see above)."
        return Section("What changed", [same], False)
    blocks = []
    if changes.params:
        rows = [
            f"| {escape(c.key, VALUE)} | {optional(c.before)} | {optional(c.after)} |" for c in changes.params
        ]
        blocks.append(table("| param | before | after |\n|---|---|---|", rows))
    lines = [file_line("Code", each) for each in changes.code]
    lines += [file_line("Data", each) for each in changes.data]
    lines += [file_line("Dependencies", each) for each in changes.dependencies]
    lines += [
        f"- Command of {escape(c.key)}: {optional(c.before)} → {optional(c.after)}" for c in changes.commands
    ]
    lines += [
        f"- Package {escape(each.name, VALUE)}: {optional(each.before)} → {optional(each.after)}"
        for each in changes.packages
    ]
    if lines:
        blocks.append(bullets(lines))
    return Section("What changed", blocks, False)


def file_line(what: str, change: FileChange) -> str:
    count = (
        f" (+{change.lines_added} −{change.lines_removed} lines)" if change.lines_added is not None else ""
    )
    return f"- {what}: {escape(change.path)} {change.kind}{count}"


def optional(text: str | None) -> str:
    return "–" if text is None else escape(text, VALUE)


def table(head: str, rows: list[str]) -> str:
    """At most ROWS of the rows, then how many more there are."""
    more = f"\n\n*… and {len(rows) - ROWS:,} more.*" if len(rows) > ROWS else ""
    return "\n".join([head, *rows[:ROWS]]) + more


def bullets(lines: list[str]) -> str:
    return "\n".join(lines[:ROWS] + ([f"- … and {len(lines) - ROWS:,} more"] if len(lines) > ROWS else []))


def examples_section(comparison: Comparison) -> Section | None:
    flips = comparison.flips
    if flips is None or not (flips.broken_count or flips.fixed_count):
        return None
    blocks = [
        f"By the mean probability over the seeds, of {comparison.test_examples:,} test examples. Single flips can "
        "be luck; the verdict is about all of them together."
    ]
    for name, what, pairs, rows in (
        ("broken", "Newly broken", flips.broken_pairs, flips.broken),
        ("fixed", "Newly fixed", flips.fixed_pairs, flips.fixed),
    ):
        if rows:
            blocks += [f"**{what}** (before → now): {flip_counts(pairs)}", *images(comparison, name)]
    if not images(comparison, "broken", "fixed"):
        blocks.append(flip_table(flips.broken[:ROWS]))
    counts = f"Test examples: {flips.broken_count:,} newly broken, {flips.fixed_count:,} newly fixed"
    return Section(counts, blocks, folded=comparison.verdict != "worse")


def flip_counts(pairs: list[FlipCount]) -> str:
    return ", ".join(
        f"{escape(p.before, 30)} → {escape(p.after, 30)}{f' × {p.count}' if p.count > 1 else ''}"
        for p in pairs
    )


def flip_table(flips: list[Flip]) -> str:
    """For when there are no pictures of them."""
    rows = [
        f"| {escape(flip.id, 30)} | {escape(flip.actual, 30)} | {escape(flip.before, 30)} | {escape(flip.after, 30)} "
        f"| {flip.confidence_after:.0%} |"
        for flip in flips
    ]
    return table("| broken example | label | before | now | confidence now |\n|---|---|---|---|---:|", rows)


def classes_section(comparison: Comparison) -> Section | None:
    if not comparison.classes or comparison.identical:
        return None
    rows, certain = [], 0
    crowded = len(comparison.classes) > ROWS
    for each in sorted(comparison.classes, key=clearness) if crowded else comparison.classes:
        recall, sure = each.recall, each.p_value is not None and each.p_value < COUNTED
        certain += sure
        if recall is None:
            rows.append(f"| {escape(each.name, 30)} | {each.examples:,} | – | – | – | – | – |")
            continue
        rows.append(
            f"| {escape(each.name, 30)} | {each.examples:,} | {value('accuracy', recall.baseline)} "
            f"| {value('accuracy', recall.candidate)} | {strong(change('accuracy', recall.difference), sure)} "
            f"| {interval('accuracy', recall.low, recall.high)} | {'–' if each.p_value is None else p_value(each.p_value)} |"
        )
    head = (
        "| class | examples | baseline | candidate | difference | 95 % interval | p (Holm) |\n"
        "|---|---:|---:|---:|---:|---|---:|"
    )
    said = f"{certain} of {len(rows)} differ detectably" if certain else "none differs detectably"
    first = ["The clearest first:"] if crowded else []
    return Section(f"Classes: {said}", [*images(comparison, "classes"), *first, table(head, rows)])


def data_section(data: DataDifference | None) -> Section | None:
    if data is None:
        return None
    leak = f"Images in both the training and the test part: {data.in_both_parts:,}"
    if data.in_both_parts_before != data.in_both_parts:
        leak += f", before {data.in_both_parts_before:,}"
    if data.in_both_parts:
        leak = f"⚠️ {leak}. The test examples among them measure memory."
    counts = ", ".join(f"{part.after:,} {part.part}" for part in data.parts)
    if not data.changed:
        return Section(f"Data: unchanged ({counts} examples)", [leak])
    blocks = [part_table(data.parts), leak]
    for part in data.parts:
        moved = [c for c in part.per_class if c.before != c.after]
        if moved:
            rows = [
                f"| {escape(c.name, 30)} | {c.before:,} | {c.after:,} | {c.after - c.before:+,} |"
                for c in moved
            ]
            blocks.append(table(f"| class ({part.part}) | before | after | |\n|---|---:|---:|---:|", rows))
    return Section(f"Data: changed ({counts} examples)", blocks)


def part_table(parts: list[PartDifference]) -> str:
    def number(count: int | None) -> str:
        return "–" if count is None else f"{count:,}"

    rows = [
        f"| {p.part} | {p.before:,} | {p.after:,} | {number(p.added)} | {number(p.removed)} | {number(p.relabelled)} |"
        for p in parts
    ]
    return table(
        "| part | before | after | added | removed | relabelled |\n|---|---:|---:|---:|---:|---:|", rows
    )


def cost_section(stages: list[StageResult]) -> Section:
    rows = []
    for stage in stages:
        seconds = duration(stage.seconds) if stage.seconds is not None else "–"
        if stage.seconds is not None and stage.baseline_seconds is not None:
            seconds += f" (before {duration(stage.baseline_seconds)})"
        memory = f"{stage.peak_memory_mib:,.0f} MiB" if stage.peak_memory_mib is not None else "–"
        if stage.peak_memory_mib is not None and stage.baseline_peak_memory_mib is not None:
            memory += f" (before {stage.baseline_peak_memory_mib:,.0f})"
        rows.append(
            f"| {escape(stage.name, 30)} | {'ran' if stage.ran else 'restored'} | {seconds} | {memory} "
            f"| {optional(stage.device)} | {'changed' if stage.outputs_changed else 'same bytes'} |"
        )
    spent = sum(stage.seconds or 0 for stage in stages)
    ran = sum(stage.ran for stage in stages)
    head = "| stage | how | time | peak memory | device | outputs |\n|---|---|---:|---:|---|---|"
    blocks = [table(head, rows)]
    if not any(stage.baseline_seconds is not None for stage in stages):
        blocks.append(
            "The baseline's cost is not at hand: DVC does not keep it. `compare --baseline-cost DIR` reads it from the "
            "reports/cost/ of the baseline's run."
        )
    return Section(f"Cost: {duration(spent)}, {ran} of {plural(len(stages), 'stage')} ran", blocks)


def reproduce_section(comparison: Comparison) -> Section:
    made = comparison.reproduce
    fingerprints = [
        f"| commit | `{made.commit}`{' with uncommitted changes' if made.dirty else ''} |",
        *([f"| baseline | `{made.baseline_commit}` |"] if made.baseline_commit else []),
        f"| dvc.lock, sha256 | `{made.lock_sha256}` |",
        f"| artifacts/model.onnx, sha256 | {f'`{made.model_sha256}`' if made.model_sha256 else 'not in this job'} |",
        *([f"| image of the job | {escape(made.image)} |"] if made.image else []),
        f"| seeds | {escape(', '.join(map(str, comparison.candidate_seeds)))} |",
    ]
    commands = "```sh\n" + "\n".join(made.commands) + "\n```"
    return Section("Reproduce", [commands, "\n".join(["| what | fingerprint |", "|---|---|", *fingerprints])])


def certainty_section(comparison: Comparison) -> Section | None:
    primary, tests = comparison.primary, comparison.tests
    if primary is None or tests is None or comparison.identical:
        return common_section(comparison)
    metric = comparison.primary_metric
    lines = [
        f"- The interval of {title(metric)} holds the noise of the test examples (paired) and of the seeds: standard "
        f"error {amount(metric, primary.standard_error)}, {primary.degrees_of_freedom:.0f} degrees of freedom, "
        f"{p_equals(primary.p_value)}. It alone makes the verdict.",
        f"- A true difference of {amount(metric, primary.smallest_detectable)} would be found 4 times out of 5.",
        f"- The two shipped models alone: {plural(tests.broken, 'example')} broken, {tests.fixed:,} fixed, exact McNemar test "
        f"{p_equals(tests.mcnemar_p_value)}. Means over the seeds: paired permutation test "
        f"{p_equals(tests.permutation_p_value)} (at most {tests.permutations:,} permutations). Neither knows the seeds' noise, "
        "so neither decides.",
        "- Of the metrics, only the primary one has a bounded chance of a false alarm: 5 % for one look at this test "
        "set, more over many pushes. Per class, Holm's correction bounds it.",
        f"- The margin is {amount(metric, comparison.margin)}: a loss that is surely smaller passes the gate.",
    ]
    return Section("How sure is this?", ["\n".join(lines)])


def common_section(comparison: Comparison) -> Section | None:
    common = comparison.common
    if common is None:
        return None
    text = (
        f"{common.shared:,} test examples are on both sides with the same label, {common.only_candidate:,} are new, "
        f"{common.only_baseline:,} are gone, {common.relabelled:,} have another label."
    )
    if common.difference:
        metric, each = comparison.primary_metric, common.difference
        text += (
            f" On those that both have, {title(metric)} is {value(metric, each.candidate)}, and was "
            f"{value(metric, each.baseline)}: {change(metric, each.difference)} "
            f"(95 % interval {interval(metric, each.low, each.high)})."
        )
    return Section("On the examples that both test sets have", [text], folded=False)


def plots_section(plots: list[Picture]) -> Section | None:
    blocks = [f"![{plot.title}]({plot.path})" for plot in plots]
    return Section("Plots of the candidate", blocks) if blocks else None


# ---- Files -----------------------------------------------------------------------------------------------------


def stage_plots() -> list[Picture]:
    """The evaluate stage's pictures, as far as they are there."""
    found = [(files.PLOTS / f"{name}.png", shown) for name, shown in STAGE_PLOTS.items()]
    return [
        Picture(path=path.relative_to(files.REPORTS).as_posix(), title=shown)
        for path, shown in found
        if path.is_file()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ml.report.comment", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--comparison", type=Path, default=COMPARISON, metavar="FILE")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f"Markdown, in {files.REPORTS}/ (default: {COMMENT})"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="a page with the pictures in it")
    arguments = parser.parse_args()
    settings, plots = load_settings(), stage_plots()
    comparison = result.load(arguments.comparison, settings.ci_commit_sha)
    markdown = compose(comparison, settings.labels, plots)
    pictures = [p.path for p in comparison.pictures + plots if f"]({p.path})" in markdown]
    if arguments.out or not arguments.html:
        out = arguments.out or COMMENT
        files.write_text(out, markdown)
        files.write_json(manifest_path(out), pictures)
    if arguments.html:
        files.write_text(arguments.html, page(markdown, files.REPORTS, pictures))


if __name__ == "__main__":
    exit_on_user_error(main)
