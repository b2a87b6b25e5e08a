"""The training loop: learning, resuming, diverging, schedules. Tiny images, so that each test takes a second."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ml import checkpoint
from ml.errors import UserError
from ml.fit import (
    Fitted,
    Progress,
    Resident,
    check_batches,
    fit,
    learning_rate,
    plan_epoch,
    shift,
    use_bfloat16,
)
from ml.params import ModelParams, TrainParams, load_params
from ml.task.model import build_model

ROOT = Path(__file__).parents[1]
DEFAULTS = load_params(ROOT / "params.yaml").train
CPU = torch.device("cpu")


def tiny_params(**changes: object) -> TrainParams:
    small = {"epochs": 3, "batch_size": 16, "learning_rate": 0.01, "log_every": 4, "checkpoint_seconds": 0.0}
    return TrainParams.model_validate(
        DEFAULTS.model_dump() | {"precision": "float32", "label_smoothing": 0.0} | small | changes
    )


def stripes(count: int, seed: int = 0) -> Resident:
    """(count, 8, 8) noisy images of two classes: bright rows, bright columns."""
    random = np.random.RandomState(seed)
    labels = random.randint(0, 2, count)
    images = random.randint(0, 60, (count, 8, 8))
    images[labels == 0, 2:4, :] += 150
    images[labels == 1, :, 2:4] += 150
    return Resident.from_arrays(images.astype(np.uint8), labels.astype(np.int64))


def run(
    params: TrainParams, seed: int = 0, file: Path | None = None, on_progress=lambda progress: None
) -> Fitted:
    torch.manual_seed(seed)
    model = build_model(ModelParams(channels=[4, 4]), (8, 8), 2, 0.2, 0.3)
    return fit(model, stripes(128), stripes(64, seed=1), params, seed, CPU, file, on_progress)


def same_weights(one: Fitted, other: Fitted) -> bool:
    assert one.state.keys() == other.state.keys()
    return all(torch.equal(one.state[name], other.state[name]) for name in one.state)


def test_fit_learns_to_tell_rows_from_columns() -> None:
    fitted = run(tiny_params())
    assert fitted.history.best.accuracy > 0.95
    assert fitted.history.train[-1].loss < fitted.history.train[0].loss


def test_fit_gives_the_same_weights_again_for_the_same_seed_and_others_for_another() -> None:
    params = tiny_params()
    assert same_weights(run(params), run(params))
    assert not same_weights(run(params), run(params, seed=1))


def test_curve_has_a_point_every_log_every_steps_and_one_at_the_end() -> None:
    fitted = run(tiny_params(log_every=5))  # 8 steps an epoch, 24 in all
    assert [point.step for point in fitted.history.train] == [5, 10, 15, 20, 24]
    assert [(point.step, point.epoch) for point in fitted.history.validation] == [(8, 1), (16, 2), (24, 3)]


def test_fit_keeps_the_epoch_with_the_lowest_validation_loss() -> None:
    # Labels that are wrong half of the time: the surer the model gets of the truth, the higher the loss.
    validation = Resident(stripes(64, seed=1).images, torch.arange(64) % 2)
    model = build_model(ModelParams(channels=[4, 4]), (8, 8), 2, 0.2, 0.3)
    fitted = fit(model, stripes(128), validation, tiny_params(epochs=6), 0, CPU)
    losses = [point.loss for point in fitted.history.validation]
    assert losses.index(min(losses)) < len(losses) - 1, "the last epoch should be worse than the best"
    model.load_state_dict(fitted.state)
    loss = torch.nn.functional.nll_loss(model.eval()(validation.images), validation.labels)
    assert loss.item() == pytest.approx(min(losses), rel=1e-5)


class Killed(Exception):
    """Stands for SIGKILL inside one process; tests/test_train.py kills real ones."""


def run_killed_at(step: int, params: TrainParams, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saves = itertools.count(1)
    save = checkpoint.save

    def save_then_die(*arguments: object) -> None:
        save(*arguments)  # type: ignore[arg-type]
        if next(saves) == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_then_die)
        with pytest.raises(Killed):
            run(params, file=file)


@pytest.mark.parametrize("step", [1, 3, 4, 7, 8, 9, 16, 23])
def test_resumed_training_ends_in_the_same_weights_and_curve(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = tiny_params(shift_pixels=1)
    whole = run(params)
    run_killed_at(step, params, tmp_path / "checkpoint", monkeypatch)
    resumed = run(params, file=tmp_path / "checkpoint")
    assert same_weights(whole, resumed)
    assert whole.history == resumed.history


class DeepNetwork(torch.nn.Module):
    """More than ten parameters of one shape, some frozen, and dropout, as a team's own model may have."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = [torch.nn.Conv2d(1, 4, 3, padding=1)]
        convolutions += [torch.nn.Conv2d(4, 4, 3, padding=1) for _ in range(7)]
        self.layers = torch.nn.Sequential(*convolutions, torch.nn.Dropout(0.3), torch.nn.Flatten())
        self.linear = torch.nn.Linear(4 * 64, 2)
        convolutions[1].requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(self.linear(self.layers(images.float().unsqueeze(1) / 255)), dim=1)


def test_resumed_training_of_a_deep_network_with_dropout_ends_in_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.test_fit.build_model", lambda *arguments: DeepNetwork())
    params = tiny_params()
    whole = run(params)
    run_killed_at(9, params, tmp_path / "checkpoint", monkeypatch)
    assert same_weights(whole, run(params, file=tmp_path / "checkpoint"))


@pytest.mark.parametrize("lost", ["optimizer", "place"])
def test_resuming_without_part_of_the_state_gives_other_weights(
    lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = tiny_params()
    whole = run(params)
    run_killed_at(9, params, tmp_path / "checkpoint", monkeypatch)

    def restore(
        self: checkpoint.Checkpoint, model: torch.nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        model.load_state_dict(self.model)

    if lost == "optimizer":
        monkeypatch.setattr(checkpoint.Checkpoint, "restore", restore)
    else:
        monkeypatch.setattr(
            "ml.fit.plan_epoch", lambda seed, epoch, *rest: plan_epoch(seed + 1, epoch, *rest)
        )
    assert not same_weights(whole, run(params, file=tmp_path / "checkpoint"))


def test_torn_checkpoint_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params, file = tiny_params(), tmp_path / "checkpoint"
    whole = run(params)
    run_killed_at(9, params, file, monkeypatch)
    file.write_bytes(file.read_bytes()[:-100])
    assert same_weights(whole, run(params, file=file))


def test_diverging_training_names_the_first_bad_step_and_the_remedy() -> None:
    params = tiny_params()
    torch.manual_seed(0)
    model = build_model(ModelParams(channels=[4, 4]), (8, 8), 2, 0.2, 0.3)
    steps = itertools.count(1)

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan") if next(steps) == 5 else gradient

    model.linear.weight.register_hook(poison)
    with pytest.raises(
        UserError, match=r"seed 3 diverged: the loss at step 6 is nan.\n.*train\.learning_rate"
    ):
        fit(model, stripes(128), stripes(64, seed=1), params, 3, CPU)


def test_progress_ends_at_the_total_number_of_samples() -> None:
    seen: list[Progress] = []
    run(tiny_params(), on_progress=seen.append)
    assert seen[-1].samples == 3 * 8 * 16
    assert seen[-1].validation_accuracy is not None


@pytest.mark.parametrize(
    ("examples", "batch", "world", "message"),
    [(10, 16, 1, "training part has 10 examples"), (100, 16, 3, "3 processes cannot share evenly")],
)
def test_batches_that_do_not_fit_are_refused(examples: int, batch: int, world: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_batches(examples, tiny_params(batch_size=batch), world)


@given(
    total=st.integers(1, 3000),
    warmup=st.floats(0, 0.99),
    schedule=st.sampled_from(["constant", "triangular", "cosine"]),
)
def test_learning_rate_stays_within_bounds_and_peaks_once(total: int, warmup: float, schedule: str) -> None:
    params = tiny_params(schedule=schedule, warmup_fraction=warmup)
    rates = np.array([learning_rate(step, total, params) for step in range(total)])
    assert (rates > 0).all() and (rates <= params.learning_rate).all()
    turns = np.diff(np.sign(np.diff(rates).round(15)))
    assert (turns <= 0).all(), "up, then down, never up again"


def test_learning_rate_of_a_triangle_by_hand() -> None:
    params = tiny_params(schedule="triangular", warmup_fraction=0.5, learning_rate=1.0)
    assert [learning_rate(step, 4, params) for step in range(4)] == [0.5, 1.0, 1.0, 0.5]


def test_epoch_plan_visits_every_example_once_and_depends_on_seed_and_epoch() -> None:
    order, shifts = plan_epoch(7, 3, 100, 2)
    assert sorted(order.tolist()) == list(range(100))
    assert shifts.shape == (100, 2) and set(shifts.flatten().tolist()) == {-2, -1, 0, 1, 2}
    for other in (plan_epoch(7, 4, 100, 2), plan_epoch(8, 3, 100, 2)):
        assert not torch.equal(order, other[0])


@given(down=st.integers(-2, 2), right=st.integers(-2, 2))
def test_shift_moves_the_image_and_fills_with_zero(down: int, right: int) -> None:
    image = torch.arange(1, 37, dtype=torch.uint8).reshape(1, 6, 6)
    moved = shift(image, torch.tensor([[down, right]]), 2)
    expected = torch.zeros(10, 10, dtype=torch.uint8)
    expected[2 + down : 8 + down, 2 + right : 8 + right] = image
    assert torch.equal(moved[0], expected[2:8, 2:8])


def test_precision_is_what_the_params_say() -> None:
    assert use_bfloat16(tiny_params(precision="bfloat16"), CPU)
    assert not use_bfloat16(tiny_params(precision="float32"), CPU)


def test_bfloat16_training_learns_too() -> None:
    assert run(tiny_params(precision="bfloat16")).history.best.accuracy > 0.95
