"""train: fit the network once per seed, choose a seed by validation, export it.

Seeds are trained side by side, one process each; under torchrun each seed is trained by all processes together.
"""

import hashlib
import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torch.export import ExportedProgram

import ml
from ml import files, parallel
from ml.cost import measured
from ml.errors import exit_on_user_error
from ml.export import export_onnx, export_program, golden
from ml.files import Examples, Split
from ml.fit import Fitted, Resident, fit, use_bfloat16
from ml.parallel import Report, choose_device
from ml.params import Params, TrainParams, load_params
from ml.settings import load_settings
from ml.task.model import build_model
from ml.tracking import runs

GOLDEN_IMAGES = 16


def train_seed(params: Params, checkpoints: Path, seed: int, device: torch.device, report: Report) -> Fitted:
    """Load the training and validation parts and fit one seed."""
    examples, split = files.load_examples(files.TRAIN_EXAMPLES), files.load_split()
    train = Resident.from_arrays(examples.images[split.train], examples.labels[split.train])
    validation = Resident.from_arrays(examples.images[split.validation], examples.labels[split.validation])
    torch.manual_seed(seed)
    model = untrained_model(params, examples, split)
    return fit(
        model, train, validation, params.train, seed, device, checkpoints / f"seed-{seed}.safetensors", report
    )


def untrained_model(params: Params, examples: Examples, split: Split) -> nn.Module:
    height, width = examples.images.shape[1:]
    return build_model(params.model, (height, width), len(examples.class_names), split.mean, split.std)


def total_samples(params: TrainParams) -> int:
    """How many examples one seed sees."""
    examples = len(files.load_split().train)
    return params.epochs * (examples // params.batch_size) * params.batch_size


def made_with(params: TrainParams) -> dict[str, Any]:
    """What bit-for-bit equality depends on, beside params, data and code."""
    device = choose_device(params)
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "precision": "bfloat16" if use_bfloat16(params, device) else "float32",
        "threads": params.threads,
        "processes_per_seed": int(os.environ["WORLD_SIZE"]) if parallel.under_torchrun() else 1,
    }


def fingerprint(params: Params) -> str:
    """Of all that decides a training: a checkpoint of another one is never gone on with."""
    parts = [
        params.model.model_dump_json(),
        params.train.model_dump_json(exclude={"seeds", "checkpoint_seconds"}),
    ]
    parts.append(json.dumps(made_with(params.train)))
    parts += [files.sha256(path) for path in (files.TRAIN_EXAMPLES, files.SPLIT)]
    package = Path(ml.__path__[0])
    code = [*sorted(package.glob("*.py")), *sorted(package.glob("task/**/*.py")), Path(__file__)]
    parts += [files.sha256(path) for path in code]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def wide(name: str, fitted: list[Fitted], seeds: list[int], points: str, fields: list[str]) -> pd.DataFrame:
    """One row per point of the curve: step, epoch, then each field's mean over the seeds and its value for each seed."""
    first = getattr(fitted[0].history, points)
    table: dict[str, list[float]] = {
        key: [getattr(point, key) for point in first] for key in ("step", "epoch")
    }
    if points == "train":
        table["learning_rate"] = [point.learning_rate for point in first]
    for field in fields:
        columns = [[getattr(point, field) for point in getattr(each.history, points)] for each in fitted]
        table[f"{name}_{field}"] = np.mean(columns, axis=0).tolist()
        table |= {f"{name}_{field}_seed_{seed}": column for seed, column in zip(seeds, columns)}
    return pd.DataFrame(table)


def save_results(params: Params, fitted: list[Fitted]) -> ExportedProgram:
    """Weights of every seed, the chosen one as the model, the curves, and what they were made with.

    Returns:
        The model as torch's graph, for what else is made of it.
    """
    seeds = params.train.seeds
    shutil.rmtree(files.SEED_WEIGHTS, ignore_errors=True)
    for seed, each in zip(seeds, fitted):
        files.save_weights(files.seed_weights(seed), arrays(each))
    chosen = min(range(len(seeds)), key=lambda index: fitted[index].history.best.loss)
    files.save_weights(files.MODEL_WEIGHTS, arrays(fitted[chosen]))

    examples, split = files.load_examples(files.TRAIN_EXAMPLES), files.load_split()
    model = untrained_model(params, examples, split)
    model.load_state_dict(fitted[chosen].state)
    sample = examples.images[split.validation[:64]]
    program = export_program(model, sample)
    files.write_bytes(files.MODEL_ONNX, export_onnx(program, model, sample))
    files.save_golden(golden(model, sample[:GOLDEN_IMAGES]))

    curve = wide("train", fitted, seeds, "train", ["loss"])
    validation_curve = wide("validation", fitted, seeds, "validation", ["loss", "accuracy"])
    files.write_text(files.TRAIN_CURVE, curve.to_csv(index=False, float_format="%.6g"))
    files.write_text(files.VALIDATION_CURVE, validation_curve.to_csv(index=False, float_format="%.6g"))

    best = [each.history.best for each in fitted]
    files.write_json(
        files.VALIDATION,
        {
            "validation_accuracy": spread([point.accuracy for point in best]),
            "validation_loss": spread([point.loss for point in best]),
        },
    )
    files.write_json(
        files.TRAINING,
        {
            "chosen_seed": seeds[chosen],
            "seeds": [
                {
                    "seed": seed,
                    "best_epoch": point.epoch,
                    "validation_loss": point.loss,
                    "validation_accuracy": point.accuracy,
                }
                for seed, point in zip(seeds, best)
            ],
            "weights": sum(parameter.numel() for parameter in model.parameters()),
            "examples": {"train": len(split.train), "validation": len(split.validation)},
            "made_with": made_with(params.train),
        },
    )
    return program


def arrays(fitted: Fitted) -> dict[str, NDArray[Any]]:
    return {name: value.numpy() for name, value in fitted.state.items()}


def spread(values: list[float]) -> dict[str, float]:
    """Mean and standard deviation over the seeds, to 6 digits."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(f"{np.mean(values):.6g}"), "seed_std": float(f"{std:.6g}")}


def fit_seconds(fitted: list[Fitted]) -> float:
    """Seconds in the training loops alone: of the process that had the most to do."""
    busy: dict[int, float] = {}
    for each in fitted:
        busy[each.process] = busy.get(each.process, 0.0) + each.seconds
    return round(max(busy.values()), 2)


def main() -> None:
    params, settings = load_params(), load_settings()
    first = os.environ.get("RANK", "0") == "0"
    checkpoints = files.CHECKPOINTS / fingerprint(params)
    samples = total_samples(params.train)
    with (
        runs.training(params, settings, checkpoints.name, made_with(params.train), record=first) as run,
        measured("train", write=first) as notes,
    ):
        fit_seed = partial(train_seed, params, checkpoints)
        if parallel.under_torchrun():
            fitted = parallel.fit_over_processes(fit_seed, params.train, samples, run.progress)
        else:
            workers = parallel.worker_count(params.train, settings.train_processes)
            fitted = parallel.fit_side_by_side(fit_seed, params.train, workers, samples, run.progress)
        if first:
            notes |= {"device": str(choose_device(params.train)), "fit_seconds": fit_seconds(fitted)}
            program = save_results(params, fitted)
            run.trained([each.history for each in fitted], program)
            shutil.rmtree(files.CHECKPOINTS, ignore_errors=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    exit_on_user_error(main)
