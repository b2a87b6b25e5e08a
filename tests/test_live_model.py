"""Which model is live: what is refused, in which order, and how all workers change together."""

import asyncio
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from ml.serve import onnx_file
from ml.serve.board import FAILED, GENERATION, Board
from ml.serve.live_model import (
    Batcher,
    LiveModel,
    Returned,
    follow,
    replace_model,
    roll_back,
    start_from,
    trial,
)
from ml.serve.model import Bundle, Refused, check_bundle, has_dark_border, load
from ml.serve.problems import Problem
from ml.serve.state import Busy, State
from ml.serve.store.base import NotFound
from ml.serve.store.directory import DirectoryStore
from ml.serve.telemetry import Telemetry
from tests.serving import hostile_models, make_images, onnx_model, write_experiment, write_golden

pytest_plugins = ["tests.serving_fixtures"]

LIMIT = 2**20


@pytest.fixture
def models(bundles: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundles, tmp_path / "models"))


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(tmp_path / "state", LIMIT)


def test_every_hostile_model_is_refused_by_the_check_that_comes_first(bundles: Path, tmp_path: Path) -> None:
    wanted = hostile_models(tmp_path, bundles / "model-v1.0.0")
    found = {}
    for tag in wanted:
        try:
            bundle = check_bundle(tmp_path / tag, LIMIT, tag)
            load(bundle)
        except Refused as error:
            found[tag] = error.check
    assert found == wanted


def test_whole_model_passes_and_answers_its_golden_images(bundles: Path) -> None:
    model = load(check_bundle(bundles / "model-v1.0.0", LIMIT))
    found = model.predict(make_images(20))
    assert found.shape == (20, 10) and (found.argmax(1) == np.arange(20) % 10).mean() > 0.7
    assert model.dark_background


def test_flipped_bits_are_refused_before_anything_is_parsed(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = models / "model-v1.0.0" / "model.onnx"
    whole = path.read_bytes()

    def parse(data: memoryview) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(onnx_file, "parse", parse)
    for place in np.random.default_rng(0).integers(0, len(whole) * 8, 50).tolist():
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(Refused) as caught:
            check_bundle(models / "model-v1.0.0", LIMIT)
        assert caught.value.check == "sha256"


def test_model_above_the_size_limit_is_refused_without_reading_it(models: Path) -> None:
    with pytest.raises(Refused) as caught:
        check_bundle(models / "model-v1.0.0", 1000)
    assert caught.value.check == "size"


def test_model_with_another_hash_than_asked_for_is_refused(bundles: Path) -> None:
    with pytest.raises(Refused) as caught:
        check_bundle(bundles / "model-v1.0.0", LIMIT, None, "0" * 64)
    assert caught.value.check == "sha256"


@pytest.mark.parametrize("shift, good", [(0.0, True), (5e-5, True), (5e-4, False), (np.nan, False)])
def test_golden_answers_decide_within_their_tolerance(tmp_path: Path, shift: float, good: bool) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "model.onnx").write_bytes(onnx_model())
    write_golden(target, shift)
    write_experiment(target)
    if good:
        load(check_bundle(target, LIMIT))
        return
    with pytest.raises(Refused) as caught:
        load(check_bundle(target, LIMIT))
    assert caught.value.check == "golden"


def test_model_that_devours_memory_dies_in_its_own_process(bundles: Path, tmp_path: Path) -> None:
    from onnx import TensorProto, helper, numpy_helper

    model = __import__("onnx").load_from_string(onnx_model())
    shape = numpy_helper.from_array(np.array([8 * 2**30], np.int64), "shape")
    model.graph.initializer.append(shape)
    one = numpy_helper.from_array(np.ones(1, np.float32))
    model.graph.node.insert(0, helper.make_node("ConstantOfShape", ["shape"], ["huge"], value=one))
    model.graph.node.insert(1, helper.make_node("ReduceMean", ["huge"], ["mean"], keepdims=0))
    model.graph.node.insert(2, helper.make_node("Add", ["weight", "mean"], ["moved"]))
    next(node for node in model.graph.node if node.op_type == "MatMul").input[1] = "moved"
    assert TensorProto.FLOAT == 1
    target = Path(shutil.copytree(bundles / "model-v1.0.0", tmp_path / "bomb"))
    (target / "model.onnx").write_bytes(model.SerializeToString())
    write_experiment(target)
    bundle = check_bundle(target, LIMIT)
    with pytest.raises(Refused):
        trial(bundle)
    trial(Bundle(bundles / "model-v1.0.0", check_bundle(bundles / "model-v1.0.0", LIMIT).experiment))


def test_pictures_on_light_ground_and_rows_of_numbers_have_no_dark_border() -> None:
    images = make_images(20)
    assert has_dark_border(images)
    assert not has_dark_border(255 - images)
    assert not has_dark_border(np.zeros((20, 1, 4), np.uint8))


def start(state: State, models: Path, workers: int = 1) -> tuple[Board, list[LiveModel]]:
    start_from(state, DirectoryStore(models), "model-v1.0.0")
    board = Board(workers)
    lives = [LiveModel(state, Telemetry(board, worker), 100) for worker in range(workers)]
    for live in lives:
        live.start()
    return board, lives


def test_first_model_is_the_one_named_or_the_newest(state: State, models: Path) -> None:
    assert start_from(state, DirectoryStore(models), None).tag == "model-v1.1.0"
    assert (
        start_from(state, DirectoryStore(models), "model-v1.0.0").tag == "model-v1.1.0"
    )  # the folder remembers
    (state.models / state.read().digest / "model.onnx").write_bytes(b"damaged")  # type: ignore[union-attr]
    assert start_from(state, DirectoryStore(models), "model-v1.0.0").tag == "model-v1.0.0"


def test_swap_and_rollback_reach_every_worker_before_they_are_acknowledged(
    state: State, models: Path
) -> None:
    async def run() -> None:
        board, lives = start(state, models, workers=3)
        tasks = [asyncio.create_task(follow(live)) for live in lives]
        swap = await asyncio.to_thread(replace_model, state, DirectoryStore(models), board, "model-v1.1.0")
        assert [live.batcher.model.tag for live in lives] == ["model-v1.1.0"] * 3
        assert (swap.changed, swap.previous, swap.workers) == (True, "model-v1.0.0", 3)
        back = await asyncio.to_thread(roll_back, state, board)
        assert [live.batcher.model.tag for live in lives] == ["model-v1.0.0"] * 3
        assert (back.tag, back.previous) == ("model-v1.0.0", "model-v1.1.0")
        again = await asyncio.to_thread(replace_model, state, DirectoryStore(models), board, "model-v1.0.0")
        assert not again.changed
        for task in tasks:
            task.cancel()

    asyncio.run(run())


def test_dry_run_checks_and_changes_nothing(state: State, models: Path) -> None:
    board, (live,) = start(state, models)
    before = state.read()
    swap = replace_model(state, DirectoryStore(models), board, "model-v1.1.0", dry_run=True)
    assert swap.dry_run and not swap.changed and state.read() == before and not live.changed()
    write_experiment(models / "model-v1.1.0", tag="model-v9")
    with pytest.raises(Refused):
        replace_model(state, DirectoryStore(models), board, "model-v1.1.0", dry_run=True)


def test_all_workers_return_to_the_old_model_when_one_cannot_load_the_new(state: State, models: Path) -> None:
    async def run() -> None:
        board, lives = start(state, models, workers=2)

        def refuse(pointer: object) -> None:
            if pointer.tag == "model-v1.1.0":  # type: ignore[attr-defined]
                raise Refused("golden", "differs on this worker")
            return whole(pointer)  # type: ignore[arg-type, return-value]

        whole = lives[1].load
        lives[1].load = refuse  # type: ignore[assignment, method-assign]
        tasks = [asyncio.create_task(follow(live)) for live in lives]
        with pytest.raises(Returned, match="model-v1.0.0 is live again"):
            await asyncio.to_thread(replace_model, state, DirectoryStore(models), board, "model-v1.1.0")
        assert [live.batcher.model.tag for live in lives] == ["model-v1.0.0"] * 2
        assert board.fixed(1)[FAILED] == 2 and board.fixed(0)[GENERATION] == board.fixed(1)[GENERATION] == 3
        for task in tasks:
            task.cancel()

    asyncio.run(run())


def test_live_model_stays_when_the_new_one_is_refused(state: State, models: Path) -> None:
    board, (live,) = start(state, models)
    (models / "model-v1.1.0" / "golden.npz").write_bytes(b"none")
    for tag, error in (("model-v1.1.0", Refused), ("model-v7", NotFound)):
        with pytest.raises(error):
            replace_model(state, DirectoryStore(models), board, tag)
    assert not live.changed() and live.batcher.model.tag == "model-v1.0.0"
    assert [
        each.name for each in state.models.iterdir() if each.name.startswith(".")
    ] == []  # nothing left behind


def test_copied_model_that_was_damaged_since_is_fetched_again(state: State, models: Path) -> None:
    board, _ = start(state, models)
    pointer = state.read()
    assert pointer is not None
    (state.models / pointer.digest / "model.onnx").write_bytes(b"damaged")
    assert (
        replace_model(state, DirectoryStore(models), board, "model-v1.0.0", dry_run=True).tag
        == "model-v1.0.0"
    )
    state.bundle(pointer.digest, pointer.tag)


def test_rollback_without_a_previous_model_says_so(state: State, models: Path) -> None:
    board, _ = start(state, models)
    with pytest.raises(NotFound, match="No model was live before"):
        roll_back(state, board)


def test_second_swap_at_a_time_waits_and_then_gives_up(state: State) -> None:
    state.folder.mkdir()
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with state.lock(1):
            held.set()
            done.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    with pytest.raises(Busy), state.lock(0.1):
        pass
    done.set()
    thread.join()


def test_old_models_are_forgotten_but_not_those_in_use(state: State, models: Path) -> None:
    start_from(state, DirectoryStore(models), "model-v1.0.0")
    for number in range(8):
        (state.models / f"{number:040x}").mkdir()
        os.utime(state.models / f"{number:040x}", (number, number))
    state.forget_old()
    pointer = state.read()
    assert pointer is not None and (state.models / pointer.digest).is_dir()
    assert sorted(each.name for each in state.models.iterdir() if each.name.startswith("00")) == [
        f"{number:040x}" for number in range(4, 8)
    ]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"generation": 1}', b'{"tag": 1, "more": 2}'])
def test_torn_pointer_changes_nothing(state: State, models: Path, content: bytes) -> None:
    _, (live,) = start(state, models)
    state.pointer_file.write_bytes(content)
    asyncio.run(live.refresh())
    assert live.batcher.model.tag == "model-v1.0.0" and not live.changed()


def test_waiting_images_share_a_run_and_too_many_are_refused(bundles: Path) -> None:
    model = load(check_bundle(bundles / "model-v1.0.0", LIMIT))
    sizes: list[int] = []

    async def run() -> None:
        batcher = Batcher(model, lambda _, images, __: sizes.append(len(images)), most=100)
        images = make_images(90)
        expected = model.predict(images)
        found = await asyncio.gather(*(batcher.predict(images[place : place + 1]) for place in range(90)))
        assert np.allclose(np.concatenate(found), expected, atol=1e-5)
        assert sizes == [64, 26]
        assert np.allclose(
            await batcher.predict(images), expected, atol=1e-5
        )  # more than a batch, from one request
        with pytest.raises(Problem) as caught:
            await asyncio.gather(*(batcher.predict(images[:60]) for _ in range(2)))
        assert caught.value.status == 503 and caught.value.headers["Retry-After"]

    asyncio.run(run())


def test_slow_model_runs_beside_the_loop(bundles: Path) -> None:
    model = load(check_bundle(bundles / "model-v1.0.0", LIMIT))
    slow = type(model)(model.experiment, model.predict, 3.0, True)

    async def run() -> None:
        batcher = Batcher(slow, lambda *_: None, most=100)
        assert not batcher.inline and batcher.batch == 1
        images = make_images(5)
        assert np.allclose(await batcher.predict(images), model.predict(images), atol=1e-5)

    asyncio.run(run())
