"""The training loop: one model, one seed, on one device or over the processes of torchrun.

The order of the examples and how they are moved come from (seed, epoch) alone, and a checkpoint holds what a model's
own draws come from, so a run that goes on from one, wherever it was killed, ends in the same weights, bit for bit.
"""

import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ml import checkpoint
from ml.errors import UserError
from ml.params import TrainParams

BETWEEN_REPORTS = 0.2  # seconds; a report costs a message to another process


@runtime_checkable
class FitsItself(Protocol):
    """A model that is not trained by gradient steps, such as a support vector machine."""

    def fit_examples(self, images: NDArray[np.uint8], labels: NDArray[np.int64], seed: int) -> None:
        """Fit on images (N, H, W) and labels (N,), all at once; draw at random by `seed` alone."""


@dataclass(frozen=True)
class Resident:
    """Examples kept whole on the device that trains on them: images (N, H, W) uint8; labels (N,) int64."""

    images: Tensor
    labels: Tensor

    @classmethod
    def from_arrays(cls, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> "Resident":
        return cls(torch.from_numpy(images), torch.from_numpy(labels))

    def to(self, device: torch.device) -> "Resident":
        return Resident(self.images.to(device), self.labels.to(device))

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class TrainPoint:
    """A point of the training curve: the mean loss of the steps since the point before."""

    step: int  # steps done, over all epochs
    epoch: float
    learning_rate: float
    loss: float


@dataclass(frozen=True)
class ValidationPoint:
    """The validation part after an epoch: mean negative log-likelihood, share of right answers."""

    step: int
    epoch: int
    loss: float
    accuracy: float


@dataclass
class History:
    train: list[TrainPoint] = field(default_factory=list)
    validation: list[ValidationPoint] = field(default_factory=list)

    @property
    def best(self) -> ValidationPoint:
        """The epoch with the lowest validation loss; the earliest of equals."""
        return min(self.validation, key=lambda point: point.loss)


@dataclass(frozen=True)
class Fitted:
    """`state`: the weights of the epoch with the lowest validation loss, on the CPU. `seconds`: of this call."""

    state: dict[str, Tensor]
    history: History
    seconds: float
    process: int


@dataclass(frozen=True)
class Progress:
    samples: int  # seen so far, over all epochs
    loss: float
    validation_accuracy: float | None
    new_points: History = field(default_factory=History)  # of the curves, since the report before


def fit(
    model: nn.Module,
    train: Resident,
    validation: Resident,
    params: TrainParams,
    seed: int,
    device: torch.device,
    checkpoint_file: Path | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Fitted:
    """Fit `model` on `train`; keep the epoch with the lowest validation loss.

    Under torchrun every process calls this alike; each takes its share of every batch of `params.batch_size`.
    A model that fits itself does so, in one step, and of `params` only the device is heeded.

    Raises:
        UserError: the batches do not fit the data or the processes, or a loss is not finite.
    """
    started = time.monotonic()
    if isinstance(model, FitsItself):
        model.fit_examples(train.images.numpy(), train.labels.numpy(), seed)
        fitted = fitted_in_one_step(
            model.to(device), train.to(device), validation.to(device), params, seed, started
        )
        in_all = (
            params.epochs * (len(train) // params.batch_size) * params.batch_size
        )  # what the bar waits for
        history = fitted.history
        on_progress(Progress(in_all, history.train[0].loss, history.best.accuracy, history))
        return fitted
    rank, world = process_rank_and_count()
    check_batches(len(train), params, world)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    batches, validation = Batches(train.to(device), params, seed, rank, world), validation.to(device)
    total_steps = params.epochs * len(batches)
    parallel = DistributedDataParallel(model) if world > 1 else model
    autocast = torch.autocast(device.type, torch.bfloat16) if use_bfloat16(params, device) else nullcontext()
    optimizer = torch.optim.Adam(model.parameters(), betas=(params.betas[0], params.betas[1]), fused=True)
    run = Run(model, optimizer, checkpoint_file)
    last_checkpoint = last_report = started

    for step in range(run.done, total_steps):
        images, labels = batches.at(step)
        with autocast:
            loss = F.cross_entropy(parallel(images), labels, label_smoothing=params.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        rate = learning_rate(step, total_steps, params)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()

        run.count(loss.detach())
        last_step = run.done == total_steps
        if run.done % params.log_every == 0 or last_step:
            run.log(run.done / len(batches), rate, seed, params)
        if run.done % len(batches) == 0:
            run.validate(validation, run.done // len(batches), seed, params)
        now = time.monotonic()
        if rank == 0 and (now - last_report >= BETWEEN_REPORTS or last_step):
            on_progress(run.progress(params.batch_size))
            last_report = now
        due = now - last_checkpoint >= params.checkpoint_seconds or last_step
        # The losses since the last point differ by process, and only this one's would be saved: wait for the point.
        if rank == 0 and due and (world == 1 or not run.losses):
            run.save()
            last_checkpoint = now
    return Fitted(run.best_state, run.history, time.monotonic() - started, os.getpid())


def fitted_in_one_step(
    model: nn.Module, train: Resident, validation: Resident, params: TrainParams, seed: int, started: float
) -> Fitted:
    """Of a model that has fitted itself: each curve has the one point that there is."""
    run = Run(model, None, None)
    loss, _ = evaluate(model, train)
    run.count(torch.tensor(loss))
    run.log(epoch=1.0, rate=0.0, seed=seed, params=params)
    run.validate(validation, epoch=1, seed=seed, params=params)
    return Fitted(run.best_state, run.history, time.monotonic() - started, os.getpid())


class Batches:
    """This process's share of each batch, by the number of the step. An epoch leaves out what fills no batch."""

    def __init__(self, train: Resident, params: TrainParams, seed: int, rank: int, world: int) -> None:
        self.train, self.seed, self.rank = train, seed, rank
        self.batch_size, self.share = params.batch_size, params.batch_size // world
        self.pixels = params.shift_pixels
        self.epoch = -1

    def __len__(self) -> int:
        """Steps in an epoch."""
        return len(self.train) // self.batch_size

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """images (share, H, W) uint8, moved at random; labels (share,) int64."""
        epoch, batch = divmod(step, len(self))
        if epoch != self.epoch:
            order, shifts = plan_epoch(self.seed, epoch, len(self.train), self.pixels)
            self.order, self.shifts = order.to(self.train.labels.device), shifts.to(self.train.labels.device)
            self.epoch = epoch
        first = batch * self.batch_size + self.rank * self.share
        rows = slice(first, first + self.share)
        images = self.train.images[self.order[rows]]
        if self.pixels:
            images = shift(images, self.shifts[rows], self.pixels)
        return images, self.train.labels[self.order[rows]]


class Run:
    """All that changes during a training, and that a checkpoint therefore holds."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None, file: Path | None) -> None:
        """Goes on from the checkpoint in `file`, if there is one; without an optimizer none is written."""
        self.model, self.optimizer = model, optimizer
        self.file = file if optimizer else None
        self.done = 0  # steps
        self.losses: list[Tensor] = []  # of the steps since the last point of the curve, on the device
        self.best_state: dict[str, Tensor] = {}
        self.history = History()
        self.reported = 0, 0  # points of the two curves
        saved = checkpoint.load(self.file) if self.file and process_rank_and_count()[0] == 0 else None
        saved = from_first_process(saved)
        if saved and optimizer:
            saved.restore(model, optimizer)
            self.done, self.best_state, self.losses = saved.step, saved.best, list(saved.losses)
            self.history = History(
                [TrainPoint(**point) for point in saved.history["train"]],
                [ValidationPoint(**point) for point in saved.history["validation"]],
            )

    def count(self, loss: Tensor) -> None:
        self.losses.append(loss)
        self.done += 1

    def log(self, epoch: float, rate: float, seed: int, params: TrainParams) -> None:
        """Add a point to the training curve."""
        first = self.done - len(self.losses)
        mean = finite_mean([loss.to(self.losses[-1].device) for loss in self.losses], first, seed, params)
        self.history.train.append(TrainPoint(self.done, epoch, rate, mean))
        self.losses = []

    def validate(self, validation: Resident, epoch: int, seed: int, params: TrainParams) -> None:
        """Add a point to the validation curve; keep the weights if it is the best."""
        loss, accuracy = evaluate(self.model, validation)
        if not math.isfinite(loss):
            raise diverged(seed, f"the validation loss after epoch {epoch} is {loss}", params)
        self.history.validation.append(ValidationPoint(self.done, epoch, loss, accuracy))
        if self.history.best.epoch == epoch:
            self.best_state = {name: value.cpu().clone() for name, value in self.model.state_dict().items()}

    def progress(self, batch_size: int) -> Progress:
        """How far it is, with the points that no report has had yet."""
        loss = self.losses[-1].item() if self.losses else self.history.train[-1].loss
        accuracy = self.history.validation[-1].accuracy if self.history.validation else None
        train, validation = self.history.train, self.history.validation
        new = History(train[self.reported[0] :], validation[self.reported[1] :])
        self.reported = len(train), len(validation)
        return Progress(self.done * batch_size, loss, accuracy, new)

    def save(self) -> None:
        if self.file and self.optimizer:
            losses = torch.stack(self.losses).cpu() if self.losses else torch.empty(0)
            history = asdict(self.history)
            checkpoint.save(
                self.file, self.model, self.optimizer, self.best_state, losses, self.done, history
            )


def process_rank_and_count() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_first_process(value: checkpoint.Checkpoint | None) -> checkpoint.Checkpoint | None:
    """The checkpoint that process 0 has, in every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def check_batches(examples: int, params: TrainParams, world: int) -> None:
    """Raises UserError when `params.batch_size` is larger than the training part or does not split over processes."""
    if params.batch_size > examples:
        raise UserError(
            f"train.batch_size is {params.batch_size}, but the training part has {examples} examples. "
            f"Set train.batch_size in params.yaml to {examples} or less."
        )
    if params.batch_size % world:
        raise UserError(
            f"train.batch_size is {params.batch_size}, which {world} processes cannot share evenly. "
            f"Set it in params.yaml to a multiple of {world}."
        )


def plan_epoch(seed: int, epoch: int, examples: int, pixels: int) -> tuple[Tensor, Tensor]:
    """The order of the examples, (N,) int64, and how far each image moves, (N, 2) int64 in ±`pixels` (down, right).

    Drawn on the CPU from (seed, epoch) alone, so every device and every process has the same plan.
    """
    generator = torch.Generator().manual_seed((seed << 20) + epoch + 1)
    order = torch.randperm(examples, generator=generator)
    shifts = torch.randint(-pixels, pixels + 1, (examples, 2), generator=generator)
    return order, shifts


def shift(images: Tensor, shifts: Tensor, pixels: int) -> Tensor:
    """Move each (H, W) image of (B, H, W) down and right by its row of `shifts`, in ±`pixels`; what comes in is 0."""
    batch, height, width = images.shape
    padded = F.pad(images, (pixels, pixels, pixels, pixels))
    rows = torch.arange(height, device=images.device) + pixels - shifts[:, :1]  # (B, H)
    columns = torch.arange(width, device=images.device) + pixels - shifts[:, 1:]  # (B, W)
    which = torch.arange(batch, device=images.device)
    return padded[which[:, None, None], rows[:, :, None], columns[:, None, :]]


def learning_rate(step: int, total_steps: int, params: TrainParams) -> float:
    """The learning rate of step 0..total_steps-1, at most `params.learning_rate`."""
    if params.schedule == "constant":
        return params.learning_rate
    warmup = params.warmup_fraction * total_steps
    if step + 1 <= warmup:
        return params.learning_rate * (step + 1) / warmup
    left = (total_steps - step) / (total_steps - warmup)  # 1 after the warm-up, towards 0 at the end
    factor = (
        min(left, 1.0) if params.schedule == "triangular" else (1 - math.cos(math.pi * min(left, 1.0))) / 2
    )
    return params.learning_rate * factor


def use_bfloat16(params: TrainParams, device: torch.device) -> bool:
    """Whether to train in bfloat16: as `params.precision` says; by `auto` only where the processor is built for it."""
    if params.precision != "auto":
        return params.precision == "bfloat16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def finite_mean(losses: list[Tensor], first: int, seed: int, params: TrainParams) -> float:
    """Mean of the losses of the steps from `first`, over all processes. One synchronisation for all of them."""
    values = torch.stack(losses)
    if dist.is_initialized():
        dist.all_reduce(values)
        values = values / dist.get_world_size()
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        step = int(bad[0])
        raise diverged(seed, f"the loss at step {first + step + 1} is {values[step].item()}", params)
    return float(values.double().mean())


def diverged(seed: int, what: str, params: TrainParams) -> UserError:
    return UserError(
        f"training with seed {seed} diverged: {what}.\n"
        f"Lower train.learning_rate in params.yaml (now {params.learning_rate}), raise train.warmup_fraction, "
        f"or set train.precision to float32."
    )


@torch.no_grad()
def evaluate(model: nn.Module, examples: Resident, batch_size: int = 1000) -> tuple[float, float]:
    """Mean negative log-likelihood and accuracy of `model` on `examples`, in float32."""
    log_probabilities = predict(model, examples.images, batch_size)
    loss = F.nll_loss(log_probabilities, examples.labels)
    accuracy = (log_probabilities.argmax(1) == examples.labels).double().mean()
    return float(loss), float(accuracy)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, batch_size: int = 1000) -> Tensor:
    """Log-probabilities (N, classes) float32 of (N, H, W) uint8 images, in evaluation mode."""
    was_training = model.training
    model.eval()
    outputs = torch.cat([model(batch) for batch in torch.split(images, batch_size)])
    model.train(was_training)
    return outputs
