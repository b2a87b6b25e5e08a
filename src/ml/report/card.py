"""The model's card: what it is, what it was made from, and how good it is → reports/model_card.md.

    python -m ml.report.card

No output of DVC, as it carries the commit, which comes after dvc.lock.
"""

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml import files
from ml.errors import exit_on_user_error
from ml.files import Predictions
from ml.params import load_judge_params
from ml import git
from ml.report.baseline import Results, load_candidate, own_results, read_json
from ml.report.escape import escape
from ml.lock import LOCK, Lock
from ml.report.statistics import metric_tables, right
from ml.report.words import amount, plural, title, value

CARD = files.REPORTS / "model_card.md"
MODEL_FILES = (files.MODEL_ONNX, files.MODEL_WEIGHTS)
WEAKEST = 3  # classes named as limits


@dataclass(frozen=True)
class Facts:
    """What the card is written from."""

    lock: Lock
    predictions: Predictions
    chosen: int  # row of the shipped seed
    data: dict[str, Any]
    metrics: dict[str, dict[str, float]]
    training: dict[str, Any]
    bins: int
    commit: str
    dirty: bool
    hashes: dict[str, str]  # sha256 by path


def gather() -> Facts:
    """Raises UserError when the working folder lacks a result, or has one that is not dvc.lock's."""
    results = load_candidate()
    with own_results():
        return facts_of(results)


def facts_of(results: Results) -> Facts:
    """Raises Unavailable."""
    hashes = {str(path): hashlib.sha256(results.side.content(path)).hexdigest() for path in MODEL_FILES}
    return Facts(
        lock=results.side.lock,
        predictions=results.predictions,
        chosen=results.chosen,
        data=results.side.read(files.DATA_SUMMARY, read_json),
        metrics=results.side.read(files.METRICS, read_json),
        training=results.side.read(files.TRAINING, read_json),
        bins=load_judge_params().evaluate.calibration_bins,
        commit=git.head(),
        dirty=git.is_dirty(),
        hashes=hashes | {LOCK: files.sha256(Path(LOCK))},
    )


def card(facts: Facts) -> str:
    """The card as Markdown, ending in a line end."""
    data, seeds = facts.data, facts.predictions.seeds.tolist()
    chosen = seeds[facts.chosen]
    weights = facts.training.get("weights")
    size = f", {weights:,} weights" if isinstance(weights, int) else ""
    blocks = [
        f"# Model card: {escape(str(data['dataset']))}",
        f"Classifier of {data['image_height']}×{data['image_width']} images into {len(data['class_names'])} classes"
        f"{size}. Trained with {plural(len(seeds), 'seed')}; shipped is seed {chosen}, which had the lowest loss on the "
        "validation part. The test examples had no say in it.",
        "## How good",
        metrics_table(facts),
        f"On {len(facts.predictions.ids):,} test examples. The interval is over the examples, the standard deviation over "
        "the seeds.",
        "## Intended use and limits",
        limits(facts),
        "## Made from",
        origin_table(facts),
        "## Params",
        params_table(facts.lock.params),
        "## Environment",
        key_table("made with", facts.training.get("made_with", {})),
    ]
    return "\n\n".join(blocks) + "\n"


def metrics_table(facts: Facts) -> str:
    tables = metric_tables(facts.predictions, facts.bins)
    rows = []
    for name, table in tables.items():
        found, seeds = facts.metrics.get(name, {}), table.mean(1)
        bounds = f"{value(name, found['low'])} to {value(name, found['high'])}" if found else "–"
        spread = amount(name, seeds.std(ddof=1)) if len(seeds) > 1 else "–"
        each = ", ".join(value(name, seed) for seed in seeds)
        rows.append(
            f"| {title(name)} | {value(name, seeds[facts.chosen])} | {value(name, seeds.mean())} "
            f"| {bounds} | {spread} | {each} |"
        )
    head = "| metric | shipped model | mean of the seeds | 95 % interval | seeds' std | each seed |"
    return "\n".join([head, "|---|---:|---:|---|---:|---|", *rows])


def limits(facts: Facts) -> str:
    """What the numbers above do not say, and where the model is weakest."""
    hits, labels = right(facts.predictions).mean(0), facts.predictions.labels
    names = facts.data["class_names"]
    recall = {label: float(hits[labels == label].mean()) for label in sorted(set(labels.tolist()))}
    weakest = sorted((label for label in recall if recall[label] < 1), key=lambda label: recall[label])[
        :WEAKEST
    ]
    listed = ", ".join(
        f"{escape(names[label], 30)} ({value('accuracy', recall[label])})" for label in weakest
    )
    worst = (
        f"Classes with the lowest recall: {listed}."
        if weakest
        else "Every test example is classified correctly."
    )
    leak = facts.data["images_in_both_parts"]
    return "\n".join(
        [
            "- Use: *say here who may use the model for what, and what it must not decide alone.*",
            "- The numbers hold for images that come about as the test examples did. Other cameras, pens or crops: "
            "measure anew; `ml.monitor` tells when inputs drift.",
            f"- {worst}",
            f"- It always answers with one of the {len(names)} classes, also for an image of none of them.",
            f"- Images in both the training and the test part: {leak:,}.",
        ]
    )


def origin_table(facts: Facts) -> str:
    data = facts.data
    rows = {
        "commit": f"{facts.commit}{' with uncommitted changes' if facts.dirty else ''}",
        **{f"{path}, sha256": digest for path, digest in facts.hashes.items()},
        **{
            f"{path}, MD5": facts.lock.sources[path] for path in sorted(facts.lock.sources) if "/" not in path
        },
        "training examples": f"{data['train']['examples']:,}",
        "test examples": f"{data['test']['examples']:,}",
    }
    return key_table("what", rows)


def params_table(params: dict[str, Any]) -> str:
    return key_table("param", dict(sorted(params.items())))


def key_table(head: str, rows: dict[str, Any]) -> str:
    lines = [f"| {escape(str(key), 100)} | {escape(str(content), 100)} |" for key, content in rows.items()]
    return "\n".join([f"| {head} | |", "|---|---|", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ml.report.card", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=CARD, metavar="FILE")
    arguments = parser.parse_args()
    files.write_text(arguments.out, card(gather()))


if __name__ == "__main__":
    exit_on_user_error(main)
