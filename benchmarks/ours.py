"""This project's loop on all of MNIST's training images, with the parameters FAST. Prints one JSON line.

With --wait-for it starts its clock once that file is there, so that several seeds can be timed side by side.
Under torchrun, one seed over all processes.
"""

import argparse
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ml import files
from ml.fit import Resident, evaluate, fit, process_rank_and_count
from ml.params import TrainParams, load_params
from ml.stages.preprocess import pixel_statistics
from ml.task.dataset import TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS, read_idx
from ml.task.model import build_model

# Chosen on a validation part of 6,000 training images, for the fastest way to 99 %: one or two epochs, no moved images.
FAST = {
    "batch_size": 128,
    "learning_rate": 0.01,
    "betas": [0.8, 0.95],
    "label_smoothing": 0.05,
    "shift_pixels": 0,
    "schedule": "triangular",
    "warmup_fraction": 0.2,
}


def read(images: str, labels: str) -> Resident:
    return Resident.from_arrays(
        read_idx(files.DATA / images, 3).copy(), read_idx(files.DATA / labels, 1).astype("int64")
    )


def train_params(changes: dict[str, Any]) -> TrainParams:
    defaults = load_params().train.model_dump()
    return TrainParams.model_validate(defaults | FAST | {"checkpoint_seconds": 3600.0} | changes)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--set", type=json.loads, default={}, help="values for the train section, as JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=60000, help="of the training images to use")
    parser.add_argument("--ready", type=Path, help="file to make when ready to start")
    parser.add_argument("--wait-for", type=Path, help="file to wait for before starting the clock")
    arguments = parser.parse_args()

    params = train_params(arguments.set)
    torch.set_num_threads(params.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    train, test = read(TRAIN_IMAGES, TRAIN_LABELS), read(TEST_IMAGES, TEST_LABELS)
    train = Resident(train.images[: arguments.samples], train.labels[: arguments.samples])
    mean, std = pixel_statistics(train.images.numpy())
    nothing = Resident(
        test.images[:1], test.labels[:1]
    )  # no validation: the other side has none in its time either

    def run(examples: Resident, epochs: int) -> tuple[float, nn.Module]:
        """Seconds, and the model after the last epoch (`fit` returns the best by validation)."""
        torch.manual_seed(arguments.seed)
        model = build_model(load_params().model, (28, 28), 10, mean, std)
        start = time.perf_counter()
        fit(model, examples, nothing, params.model_copy(update={"epochs": epochs}), arguments.seed, device)
        return time.perf_counter() - start, model

    run(Resident(train.images[: params.batch_size * 10], train.labels[: params.batch_size * 10]), 1)
    if arguments.ready:
        arguments.ready.touch()
    while arguments.wait_for and not arguments.wait_for.exists():
        time.sleep(0.01)
    seconds, model = run(train, params.epochs)

    if process_rank_and_count()[0] == 0:
        samples = params.epochs * (len(train) // params.batch_size) * params.batch_size
        weights = b"".join(
            value.cpu().contiguous().numpy().tobytes() for value in model.state_dict().values()
        )
        answer = {
            "samples_per_s": samples / seconds,
            "seconds": seconds,
            "sha256": hashlib.sha256(weights).hexdigest(),
        }
        print(json.dumps(answer | {"accuracy": evaluate(model, test.to(device))[1]}))


if __name__ == "__main__":
    main()
