"""evaluate: the one look at the test examples. Predictions of every seed, metrics with intervals, figures."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from ml import files, metrics, plots
from ml.cost import measured
from ml.errors import UserError, exit_on_user_error
from ml.files import Examples, Predictions, Split
from ml.fit import predict
from ml.metrics import ClassScores, Estimate, ReliabilityBin
from ml.parallel import choose_device
from ml.params import EvaluateParams, Params, load_params
from ml.settings import load_settings
from ml.task.model import build_model
from ml.tracking import runs


def predict_with_every_seed(params: Params, test: Examples, split: Split) -> Predictions:
    """Probabilities of each seed's model for each test example, computed in float32."""
    torch.set_num_threads(params.train.threads)  # another number may round otherwise
    device = choose_device(params.train)
    height, width = test.images.shape[1:]
    images = torch.from_numpy(test.images).to(device)
    probabilities = []
    for seed in params.train.seeds:
        model = build_model(params.model, (height, width), len(test.class_names), split.mean, split.std)
        put_weights(model, files.seed_weights(seed))
        probabilities.append(predict(model.to(device), images).exp().cpu().numpy())
    return Predictions(test.ids, test.labels, np.array(params.train.seeds), np.stack(probabilities))


def put_weights(model: nn.Module, path: Path) -> None:
    """Raises UserError when the file's tensors are not those of `model`."""
    weights = {name: torch.from_numpy(value) for name, value in files.load_weights(path).items()}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"{path} holds the weights of another network: {error}\nRun `dvc repro train`, or `dvc checkout {path.parent}`."
        ) from None


def mistake_sheet(test: Examples, predictions: Predictions, count: int) -> bytes:
    rows = metrics.worst_mistakes(predictions, count)
    mean = predictions.probabilities.mean(0)
    captions = [
        f"{plots.literal(test.class_names[test.labels[row]])} → {plots.literal(test.class_names[mean[row].argmax()])}\n"
        f"{mean[row].max():.0%} sure"
        for row in rows
    ]
    wrong = int((mean.argmax(1) != test.labels).sum())
    title = f"Worst mistakes: actual → predicted ({len(rows)} of {wrong} wrong in {len(test):,}, by the seeds' mean)"
    return plots.png(plots.contact_sheet(test.images[rows], captions, title))


def save_figures(
    test: Examples,
    predictions: Predictions,
    estimates: dict[str, Estimate],
    scores: list[ClassScores],
    bins: list[ReliabilityBin],
    params: EvaluateParams,
) -> None:
    class_names = test.class_names.tolist()
    curves = plots.training_curves(pd.read_csv(files.TRAIN_CURVE), pd.read_csv(files.VALIDATION_CURVE))
    matrix = plots.confusion_matrix(metrics.confusion(predictions), class_names, len(predictions.seeds))
    figures = {
        "training_curves": plots.png(curves),
        "confusion_matrix": plots.png(matrix),
        "per_class": plots.png(plots.per_class(scores, class_names)),
        "reliability": plots.png(plots.reliability(bins, estimates["calibration_error"])),
        "worst_mistakes": mistake_sheet(test, predictions, params.worst_mistakes),
    }
    for name, content in figures.items():
        files.write_bytes(files.PLOTS / f"{name}.png", content)


def save_tables(
    test: Examples,
    predictions: Predictions,
    estimates: dict[str, Estimate],
    scores: list[ClassScores],
    bins: list[ReliabilityBin],
) -> None:
    files.write_json(files.METRICS, {name: rounded(estimate) for name, estimate in estimates.items()})
    by_seed = {"seed": predictions.seeds, **{name: estimate.per_seed for name, estimate in estimates.items()}}
    write_csv(files.PER_SEED, pd.DataFrame(by_seed))
    write_csv(
        files.PER_CLASS,
        pd.DataFrame([{"class": name, **asdict(s)} for name, s in zip(test.class_names, scores)]),
    )
    write_csv(files.RELIABILITY, pd.DataFrame([asdict(each) for each in bins]))
    predicted = predictions.probabilities.mean(0).argmax(1)
    actual = test.class_names[test.labels]
    write_csv(files.CONFUSION, pd.DataFrame({"actual": actual, "predicted": test.class_names[predicted]}))


def rounded(estimate: Estimate) -> dict[str, float]:
    """Six digits: more would only show in which order the sums were made."""
    values = {key: value for key, value in asdict(estimate).items() if key != "per_seed"}
    return {key: float(f"{value:.6g}") for key, value in values.items()}


def write_csv(path: Path, table: pd.DataFrame) -> None:
    files.write_text(path, table.to_csv(index=False, float_format="%.6g"))


def main() -> None:
    params, settings = load_params(), load_settings()
    with runs.evaluation(params, settings) as run, measured("evaluate"):
        test, split = files.load_examples(files.TEST_EXAMPLES), files.load_split()
        predictions = predict_with_every_seed(params, test, split)
        files.save_predictions(predictions)

        estimates = metrics.estimate(predictions, params.evaluate.resamples, params.evaluate.calibration_bins)
        scores = metrics.per_class(predictions)
        bins = metrics.reliability(predictions, params.evaluate.calibration_bins)
        save_tables(test, predictions, estimates, scores, bins)
        save_figures(test, predictions, estimates, scores, bins, params.evaluate)
        run.evaluated()


if __name__ == "__main__":
    exit_on_user_error(main)
