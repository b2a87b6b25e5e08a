"""How often the verdict is wrong, how long it takes, and how much the report job installs.

Each share of independent runs is printed with n and its 95 % interval.

python -m benchmarks.verdict simulate [--runs 1000]     merge requests whose truth is known
python -m benchmarks.verdict seeds [--keep FILE]        real trainings with the same params and other seeds
python -m benchmarks.verdict speed                      compare, then comment: 10,000 examples × 5 seeds
python -m benchmarks.verdict size                       the report job's environment, in a fresh folder
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from ml import files
from ml.files import Predictions
from ml.report.gate import rule
from ml.report.statistics import PSEUDO_FLIPS, Difference, difference, right

Floats = NDArray[np.float64]
MARGIN = 0.001

# ---- Simulation ----------------------------------------------------------------------------------------------------
# Each test example has its own chance to be taken for something else, drawn anew for each merge request: 0 for most,
# Beta(1/2, 3/2) for a share HARD. That gives an accuracy of 99.2 % and 0.8 % of examples on which two trainings of the
# same recipe disagree, as on MNIST; the seeds' standard deviation is then 0.063 pp. `wobble` multiplies the odds of
# all hard examples by a factor that each seed draws (log-normal), for seeds that differ more than such coin flips do.
HARD = 0.032
MEAN_OF_HARD = 0.25


@dataclass(frozen=True)
class Case:
    """A kind of merge request: sizes, how much seeds wobble, and the truth."""

    name: str
    examples: int = 10_000
    seeds: tuple[int, int] = (5, 5)  # candidate, baseline
    wobble: float = 0.0
    drop: float = 0.0  # of the candidate's true accuracy
    spread: bool = True  # over the hard examples; else on examples that were never wrong before
    swapped: float = (
        0.0  # share of examples that the candidate has right and the baseline wrong, and as many otherwise
    )
    hard: float = HARD


CASES = (
    Case("A/A"),
    Case("A/A, seeds 0.07 pp", wobble=0.1),
    Case("A/A, seeds 0.13 pp", wobble=0.3),
    Case("A/A, 3 seeds", seeds=(3, 3), wobble=0.1),
    Case("A/A, 3 seeds, 0.12 pp", seeds=(3, 3), wobble=0.3),
    Case("A/A, 2 seeds", seeds=(2, 2), wobble=0.1),
    Case("A/A, 5 and 1 seeds", seeds=(5, 1), wobble=0.1),
    Case("A/A, 1 and 3 seeds", seeds=(1, 3), wobble=0.1),
    Case("other recipe, as good", swapped=0.002),
    Case("360 examples, 3 seeds, A/A", examples=360, seeds=(3, 3), wobble=0.3, hard=0.2),
    Case("drop 0.1 pp", drop=0.001),
    Case("drop 0.2 pp", drop=0.002),
    Case("drop 0.3 pp", drop=0.003),
    Case("drop 0.3 pp, seeds 0.07 pp", drop=0.003, wobble=0.1),
    Case("drop 0.3 pp, other examples", drop=0.003, spread=False),
    Case("drop 0.3 pp, seeds 0.13 pp", drop=0.003, wobble=0.3),
    Case("drop 0.3 pp, 3 seeds", drop=0.003, seeds=(3, 3)),
)


def chances(case: Case, random: np.random.Generator) -> tuple[Floats, Floats]:
    """Each example's chance to be wrong: the candidate's and the baseline's."""
    hard = random.random(case.examples) < case.hard
    baseline = np.where(hard, random.beta(0.5, 1.5, case.examples), 0.0)
    candidate = baseline.copy()
    if case.drop and case.spread:
        candidate[hard] += (1 - baseline[hard]) * case.drop / (case.hard * (1 - MEAN_OF_HARD))
    elif case.drop:
        candidate[~hard & (random.random(case.examples) < case.drop / (1 - case.hard))] = 1.0
    lot = random.random(case.examples)
    candidate[lot < case.swapped], baseline[lot < case.swapped] = 0.0, 1.0
    mirrored = (lot >= case.swapped) & (lot < 2 * case.swapped)
    candidate[mirrored], baseline[mirrored] = 1.0, 0.0
    return candidate, baseline


def results(chance: Floats, seeds: int, wobble: float, random: np.random.Generator) -> Floats:
    """(seeds, N): 1.0 where right."""
    factor = np.exp(wobble * random.standard_normal((seeds, 1)))
    wrong = chance * factor / (1 - chance + chance * factor)
    return (random.random((seeds, len(chance))) >= wrong).astype(np.float64)


def simulate(runs: int) -> None:
    print(f"{runs} merge requests each; report.margin {MARGIN}; share of them, with its 95 % interval")
    head = ("case", "better", "worse", "blocked", "blocked if undecided", "std error", "seeds' std")
    print(("{:<30}" + "{:>22}" * 4 + "{:>11}" * 2).format(*head))
    for number, case in enumerate(CASES):
        random = np.random.default_rng(number)
        found, stds = [], []
        for _ in range(runs):
            candidate, baseline = chances(case, random)
            new = results(candidate, case.seeds[0], case.wobble, random)
            old = results(baseline, case.seeds[1], case.wobble, random)
            found.append(difference(new, old, PSEUDO_FLIPS))
            stds += [table.mean(1).std(ddof=1) for table in (new, old) if len(table) > 1]
        errors = f"{100 * np.mean([each.standard_error for each in found]):.3f} pp"
        print(
            f"{case.name:<30}{shares(found)}{errors:>11}{100 * np.sqrt(np.mean(np.square(stds))):>8.3f} pp",
            flush=True,
        )


def shares(found: list[Difference]) -> str:
    counts = (
        sum(each.low > 0 for each in found),
        sum(each.high < 0 for each in found),
        sum(not rule(each, "accuracy", MARGIN, "pass").passes for each in found),
        sum(not rule(each, "accuracy", MARGIN, "block").passes for each in found),
    )
    return "".join(f"{share(count, len(found)):>22}" for count in counts)


def share(count: int, total: int) -> str:
    bounds = binomtest(count, total).proportion_ci(0.95, method="exact")
    return f"{count / total:.1%} ({bounds.low:.1%}–{bounds.high:.1%})"


# ---- Real trainings ------------------------------------------------------------------------------------------------


def train_seeds(data: Path, count: int, train_images: int, file: Path) -> Predictions:
    """MNIST's test images as seen by `count` models that differ in their seed alone; kept in `file`."""
    if file.exists():
        kept = files.load_predictions(file)
        if len(kept.seeds) != count:
            sys.exit(
                f"{file} holds {len(kept.seeds)} trainings, not {count}. Delete it, or pass --count {len(kept.seeds)}."
            )
        return kept
    import torch

    from ml.fit import Resident, fit, predict
    from ml.params import load_params
    from ml.task.dataset import read_dataset
    from ml.task.model import build_model

    torch.set_num_threads(1)
    params = load_params()
    recipe = params.train.model_copy(
        update={"epochs": 1, "device": "cpu", "precision": "float32", "log_every": 1000}
    )
    dataset = read_dataset(data, "mnist")
    images, labels = dataset.train.images[:train_images].copy(), dataset.train.labels[:train_images]
    scaled = images / 255
    validation = Resident.from_arrays(dataset.train.images[-500:].copy(), dataset.train.labels[-500:])
    probabilities = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = build_model(params.model, (28, 28), 10, float(scaled.mean()), float(scaled.std()))
        fitted = fit(
            model, Resident.from_arrays(images, labels), validation, recipe, seed, torch.device("cpu")
        )
        model.load_state_dict(fitted.state)
        with torch.inference_mode():
            probabilities.append(predict(model, torch.from_numpy(dataset.test.images.copy())).exp().numpy())
        print(f"seed {seed} of {count}", file=sys.stderr, flush=True)
    predictions = Predictions(
        dataset.test.ids, dataset.test.labels, np.arange(count), np.stack(probabilities)
    )
    files.save_arrays(file, **vars(predictions))
    return predictions


def seeds(data: Path, count: int, train_images: int, keep: Path) -> None:
    """Disjoint sets of seeds, each set compared with the next; then 1,000 random pairs of sets.

    The random pairs share the same trainings, so they are not 1,000 independent ones: a share without an interval.
    `train_images` is what `keep` was made with, if it is there.
    """
    predictions = train_seeds(data, count, train_images, keep)
    recipe = f"(1 epoch, {train_images:,} images)"
    table = right(predictions)
    print(
        f"{count} trainings of MiniCNN on {train_images:,} MNIST images, 1 epoch, same params: accuracy "
        f"{table.mean():.2%} on {table.shape[1]:,} test images, standard deviation over the seeds "
        f"{100 * table.mean(1).std(ddof=1):.3f} pp"
    )
    for size in (2, 3, 5):
        sets = np.arange(count // size * size).reshape(-1, size)
        pairs = [(sets[k], sets[k + 1]) for k in range(0, len(sets) - 1, 2)]
        report(f"{len(pairs)} disjoint pairs of sets of {size} seeds {recipe}", table, pairs)
        random = np.random.default_rng(size)
        drawn = [random.permutation(count)[: 2 * size].reshape(2, size) for _ in range(1000)]
        what = f"1,000 random pairs of sets of {size} of the same {count} seeds {recipe}"
        report(what, table, [(pair[0], pair[1]) for pair in drawn], independent=False)
    luck = [(np.array([a]), np.array([b])) for a, b in zip(range(0, count, 2), range(1, count, 2))]
    called = sum(abs(single(table, a[0], b[0])) > 0 for a, b in luck)
    print(
        f"  for comparison, McNemar's exact test on {len(luck)} pairs of single seeds {recipe}: "
        f"{share(called, len(luck))}"
    )


def single(table: Floats, a: int, b: int) -> int:
    """Whether McNemar's test at 5 % calls seed b better (1) or worse (-1) than seed a."""
    gained, lost = int((table[b] > table[a]).sum()), int((table[b] < table[a]).sum())
    certain = gained + lost > 0 and binomtest(gained, gained + lost).pvalue < 0.05
    return int(np.sign(gained - lost)) if certain else 0


def report(
    what: str,
    table: Floats,
    pairs: list[tuple[NDArray[np.int64], NDArray[np.int64]]],
    independent: bool = True,
) -> None:
    found = [difference(table[a], table[b], PSEUDO_FLIPS) for a, b in pairs]
    changed = sum(each.low > 0 or each.high < 0 for each in found)
    blocked = sum(not rule(each, "accuracy", MARGIN, "pass").passes for each in found)
    said = [
        share(count, len(found)) if independent else f"{count / len(found):.1%}"
        for count in (changed, blocked)
    ]
    print(f"  {what}: called a change {said[0]}, blocked {said[1]}")


# ---- Speed ---------------------------------------------------------------------------------------------------------


def speed(repetitions: int) -> None:
    """Both commands in a made-up repository of 10,000 examples, 10 classes and 5 seeds on each side."""
    from tests.experiment import make_experiment

    with tempfile.TemporaryDirectory() as folder:
        experiment = make_experiment(Path(folder, "repo"))
        with contextlib.chdir(experiment.folder):  # DVC looks for its stages from there
            experiment.write_results(big(0), names=tuple("0123456789"))
            baseline = experiment.commit("baseline")
            experiment.write_results(big(5), names=tuple("0123456789"))
            experiment.commit("candidate")
        for _ in range(repetitions):
            spent = [
                timed(experiment.folder, "ml.report.compare", "--baseline", baseline),
                timed(experiment.folder, "ml.report.comment"),
            ]
            print(f"compare {spent[0]:.1f} s, comment {spent[1]:.1f} s, together {sum(spent):.1f} s")


def big(first_seed: int) -> Predictions:
    random = np.random.default_rng(first_seed)
    labels = np.arange(10_000) % 10
    scores = random.gumbel(size=(5, 10_000, 10)).astype(np.float32)
    np.put_along_axis(scores, np.broadcast_to(labels[None, :, None], (5, 10_000, 1)), 6.5, axis=2)
    probabilities = np.exp(scores) / np.exp(scores).sum(2, keepdims=True)
    ids = np.array([f"{number:016x}" for number in range(10_000)])
    return Predictions(ids, labels, np.arange(first_seed, first_seed + 5), probabilities)


def timed(folder: Path, module: str, *arguments: str) -> float:
    # in a pipeline, that is about another repository
    environment = {name: value for name, value in os.environ.items() if name != "CI_COMMIT_SHA"}
    command = [sys.executable, "-m", module, *arguments]
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    return time.perf_counter() - start


# ---- Size ----------------------------------------------------------------------------------------------------------

SIZE_GOAL = 300  # MB, of 1,000,000 bytes


def size(root: Path) -> None:
    """What a fresh environment for the report job holds, compiled modules left out."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        python = next(Path(folder).glob("*/python"))
        install = ["install", "--quiet", "--no-compile", "--constraint", root / "constraints.txt"]
        command = [sys.executable, "-m", "pip", "--python", python, *install, f"{root}[report]"]
        subprocess.run(command, check=True)
        packages = next(Path(folder).glob("lib/python*/site-packages"))
        sizes: Counter[str] = Counter()
        for path in packages.rglob("*"):
            if path.is_file() and not path.is_symlink():
                sizes[path.relative_to(packages).parts[0]] += path.stat().st_size
    total = sum(sizes.values()) / 1e6
    met = "met" if total < SIZE_GOAL else "not met"
    print(f"report job's site-packages: {total:.0f} MB; goal under {SIZE_GOAL} MB: {met}")
    print("largest: " + ", ".join(f"{name} {found / 1e6:.0f} MB" for name, found in sizes.most_common(8)))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.verdict", description=(__doc__ or "").splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    simulation = commands.add_parser("simulate")
    simulation.add_argument("--runs", type=int, default=1000)
    real = commands.add_parser("seeds")
    real.add_argument("--data", type=Path, default=files.DATA, help="folder with MNIST's four files")
    real.add_argument("--count", type=int, default=200)
    real.add_argument("--train-images", type=int, default=6000)
    real.add_argument("--keep", type=Path, default=Path("reports/bench/seeds.npz"))
    timing = commands.add_parser("speed")
    timing.add_argument("--repetitions", type=int, default=3)
    commands.add_parser("size")
    arguments = parser.parse_args()
    if arguments.command == "simulate":
        simulate(arguments.runs)
    elif arguments.command == "seeds":
        seeds(arguments.data, arguments.count, arguments.train_images, arguments.keep)
    elif arguments.command == "speed":
        speed(arguments.repetitions)
    else:
        size(Path(__file__).parents[1])


if __name__ == "__main__":
    main()
