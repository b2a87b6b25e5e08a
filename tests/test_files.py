"""Files between the stages: whole or untouched whatever fails, the same bytes again, and torn files named."""

import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ml import files
from ml.errors import UserError
from ml.files import Examples, Predictions, Split


def examples() -> Examples:
    return Examples(
        np.arange(60, dtype=np.uint8).reshape(5, 4, 3),
        np.array([0, 1, 2, 0, 1]),
        np.array(["a", "b", "c", "c-1", "d"]),
        np.array(["cat", "Hündin", "猫"]),
    )


def predictions() -> Predictions:
    probabilities = np.random.RandomState(0).dirichlet(np.ones(3), (2, 5)).astype(np.float32)
    return Predictions(examples().ids, examples().labels, np.array([0, 7]), probabilities)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Writing: all or nothing


def test_writing_makes_the_folders_and_replaces_the_content(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    files.write_text(path, "first, longer")
    files.write_text(path, "zweite ä")
    assert path.read_bytes() == "zweite ä".encode()
    assert names(path.parent) == ["file"]


@pytest.mark.parametrize("error", [ValueError, UserError, KeyboardInterrupt, SystemExit])
def test_old_content_stays_when_the_writer_raises(tmp_path: Path, error: type[BaseException]) -> None:
    files.write_text(tmp_path / "file", "old")
    with pytest.raises(error):
        with files.atomic(tmp_path / "file") as file:
            file.write(b"half of the n")
            file.flush()
            raise error
    assert (tmp_path / "file").read_text() == "old" and names(tmp_path) == ["file"]


def test_content_is_invisible_until_it_is_whole(tmp_path: Path) -> None:
    files.write_text(tmp_path / "file", "old")
    with open(tmp_path / "file") as reader:
        with files.atomic(tmp_path / "file") as file:
            file.write(b"new")
            file.flush()
            assert (tmp_path / "file").read_text() == "old"
        assert (tmp_path / "file").read_text() == "new"
        assert reader.read() == "old"  # who opened it before reads on in the old file


WRITERS = {
    "text": "files.write_text(path, 5000 * 'new')",
    "arrays": "files.save_arrays(path, first=np.zeros(3), second=np.arange(5000))",
    "weights": "files.save_weights(path, {'layer': np.ones((100, 100), np.float32)})",
    "json": "files.write_json(path, list(range(5000)))",
}


def run_writer(writer: str, before: str) -> subprocess.CompletedProcess[str]:
    """Save 'old' and then run the writer in another process, `before` being run in between; exit 1 on UserError."""
    program = (
        "import os, resource, numpy as np, safetensors.numpy\n"
        "from pathlib import Path\n"
        "from ml import errors, files\n"
        "path = Path('file')\n"
        "files.write_text(path, 'old')\n"
        f"{before}\n"
        f"errors.exit_on_user_error(lambda: {WRITERS[writer]})\n"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "writer, limit", [("text", 100), ("arrays", 9), ("arrays", 9000), ("weights", 100), ("json", 99)]
)
def test_old_content_stays_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, limit: int
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = run_writer(writer, f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))")
    assert answer.returncode == 1 and "Traceback" not in answer.stderr
    assert "file could not be written: " in answer.stderr and "Make room" in answer.stderr
    assert (tmp_path / "file").read_text() == "old" and names(tmp_path) == ["file"]


def test_old_content_stays_when_the_folder_must_not_be_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    give_up_root = "os.chmod('.', 0o555)\nif os.geteuid() == 0: os.setuid(65534)"
    answer = run_writer("text", give_up_root)
    tmp_path.chmod(0o755)
    assert answer.returncode == 1 and "Traceback" not in answer.stderr
    assert "file could not be written: Permission denied" in answer.stderr
    assert (tmp_path / "file").read_text() == "old" and names(tmp_path) == ["file"]


def test_place_that_cannot_be_written_is_a_user_error_naming_it(tmp_path: Path) -> None:
    (tmp_path / "folder" / "content").mkdir(parents=True)
    with pytest.raises(UserError, match="folder could not be written"):
        files.write_text(tmp_path / "folder", "text")
    (tmp_path / "file").write_text("old")
    with pytest.raises(UserError, match="file/below could not be written"):
        files.write_text(tmp_path / "file" / "below", "text")
    with pytest.raises(UserError, match="file/further/below could not be written"):
        files.write_text(tmp_path / "file" / "further" / "below", "text")
    assert names(tmp_path) == ["file", "folder"] and (tmp_path / "file").read_text() == "old"


# Round trips


def test_examples_load_as_saved(tmp_path: Path) -> None:
    files.save_examples(tmp_path / "train.npz", examples())
    loaded = files.load_examples(tmp_path / "train.npz")
    for name, array in vars(examples()).items():
        found = getattr(loaded, name)
        assert found.dtype == array.dtype and np.array_equal(found, array)
    assert len(loaded) == 5


def test_split_loads_as_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files.save_split(Split(np.array([0, 2]), np.array([1]), 1 / 3, 0.1 + 0.2))
    loaded = files.load_split()
    assert loaded.train.tolist() == [0, 2] and loaded.validation.tolist() == [1]
    assert (loaded.mean, loaded.std) == (1 / 3, 0.1 + 0.2)


def test_predictions_load_as_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files.save_predictions(predictions())
    loaded = files.load_predictions()
    for name, array in vars(predictions()).items():
        found = getattr(loaded, name)
        assert found.dtype == array.dtype and np.array_equal(found, array)


def test_weights_load_as_saved_whatever_their_memory_layout(tmp_path: Path) -> None:
    weights = {"layer": np.arange(12, dtype=np.float32).reshape(3, 4).T, "steps": np.array(7)}
    files.save_weights(tmp_path / "weights", weights)
    loaded = files.load_weights(tmp_path / "weights")
    assert set(loaded) == set(weights)
    for name, value in weights.items():
        assert np.array_equal(loaded[name], value) and loaded[name].dtype == value.dtype


def test_json_keeps_order_and_text_and_ends_in_a_newline(tmp_path: Path) -> None:
    content = {"z": [1, 2.5, None, True], "a": {"ü": "<b>"}}
    files.write_json(tmp_path / "file.json", content)
    text = (tmp_path / "file.json").read_text(encoding="utf-8")
    assert files.read_json(tmp_path / "file.json", "load") == content
    assert list(json.loads(text)) == ["z", "a"] and "ü" in text and text.endswith("}\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float64("nan")])
def test_number_that_json_has_not_is_refused_and_nothing_is_written(tmp_path: Path, value: float) -> None:
    files.write_json(tmp_path / "file.json", 1)
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "file.json", {"loss": value})
    assert (tmp_path / "file.json").read_text() == "1\n" and names(tmp_path) == ["file.json"]


def test_same_content_gives_the_same_bytes_at_another_time_and_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []
    for folder, clock in ((tmp_path / "one", 1_000_000_000), (tmp_path / "two", 1_700_000_000)):
        monkeypatch.setattr("time.time", lambda: float(clock))
        files.save_examples(folder / "examples", examples())
        files.save_weights(
            folder / "weights", {"b": np.ones(3, np.float32), "a": np.zeros((2, 2), np.float32)}
        )
        files.write_json(folder / "json", {"b": 1, "a": [0.1]})
        saved.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert saved[0] == saved[1] and set(saved[0]) == {"examples", "weights", "json"}


def test_checksums_are_those_of_the_content(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert files.md5(tmp_path / "file") == hashlib.md5(content).hexdigest()
    assert files.sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


# Files that are missing, torn, or something else

LOADERS: dict[str, Callable[[Path], object]] = {
    "npz": files.load_examples,
    "json": lambda path: files.read_json(path, "load"),
    "safetensors": files.load_weights,
}
STAGES = {"npz": "load", "json": "load", "safetensors": "train"}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("good")
    files.save_examples(folder / "npz", examples())
    files.write_json(folder / "json", {"loss": 0.5, "name": "Hündin"})
    weights = {"layer": np.linspace(-1, 1, 40, dtype=np.float32), "bias": np.zeros(3, np.float32)}
    files.save_weights(folder / "safetensors", weights)
    return {kind: (folder / kind).read_bytes() for kind in LOADERS}


@pytest.mark.parametrize("kind", LOADERS)
def test_missing_file_is_named_with_the_stage_that_makes_it(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match=f"nothing.{kind} is missing. Run `dvc repro {STAGES[kind]}`"):
        LOADERS[kind](tmp_path / f"nothing.{kind}")


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_truncated_file_is_named_with_the_remedy(
    tmp_path: Path, good: dict[str, bytes], kind: str, share: float
) -> None:
    path = tmp_path / f"torn.{kind}"
    path.write_bytes(good[kind][: int(share * (len(good[kind]) - 2))])
    with pytest.raises(UserError) as caught:
        LOADERS[kind](path)
    assert str(path) in str(caught.value) and f"dvc checkout --force {path}" in str(caught.value)


@pytest.mark.parametrize("kind", LOADERS)
@settings(max_examples=60)
@given(data=st.data())
def test_damaged_file_loads_or_is_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, good: dict[str, bytes], kind: str, data: st.DataObject
) -> None:
    content = bytearray(good[kind])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / f"damaged.{kind}"
    path.write_bytes(content)
    try:
        LOADERS[kind](path)
    except UserError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("kind", LOADERS)
@settings(max_examples=60)
@given(content=st.binary(max_size=300))
@example(content=b"PK\x03\x04")
@example(content=b"PK\x05\x06" + bytes(18))
@example(content=b"\x93NUMPY\x01\x00")
@example(content=b"\xff\xff\xff\xff\xff\xff\xff\xff{}")
def test_bytes_of_something_else_are_a_user_error_or_a_value(
    tmp_path_factory: pytest.TempPathFactory, kind: str, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / f"other.{kind}"
    path.write_bytes(content)
    try:
        LOADERS[kind](path)
    except UserError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("kind", LOADERS)
def test_folder_in_place_of_a_file_is_a_user_error(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match=tmp_path.name):
        LOADERS[kind](tmp_path)


def test_single_array_in_place_of_npz_is_a_user_error(tmp_path: Path) -> None:
    content = io.BytesIO()
    np.save(content, np.arange(3))
    (tmp_path / "file.npz").write_bytes(content.getvalue())
    with pytest.raises(UserError, match="does not hold the arrays images, labels"):
        files.load_examples(tmp_path / "file.npz")


def test_npz_that_lacks_an_array_or_holds_objects_is_a_user_error(tmp_path: Path) -> None:
    files.save_arrays(tmp_path / "file.npz", images=np.zeros(3))
    with pytest.raises(UserError, match="labels"):
        files.load_examples(tmp_path / "file.npz")
    np.savez(tmp_path / "objects.npz", code=np.array([{"any": "object"}], dtype=object))
    with pytest.raises(UserError, match="objects.npz does not hold"):
        files.load_arrays(tmp_path / "objects.npz", "load", ("code",))


def test_python_objects_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Object arrays"):
        files.save_arrays(tmp_path / "new.npz", code=np.array([{"any": "object"}], dtype=object))
    assert names(tmp_path) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weight_that_is_not_finite_is_refused_with_its_name(tmp_path: Path, value: float) -> None:
    weights = {"fine": np.zeros(3, np.float32), "layer.bias": np.array([0, value, 1], np.float32)}
    files.save_weights(tmp_path / "weights", weights)
    with pytest.raises(UserError, match="weights: layer.bias holds values that are not finite"):
        files.load_weights(tmp_path / "weights")


def test_weights_of_a_type_that_numpy_has_not_are_a_user_error(tmp_path: Path) -> None:
    header = json.dumps({"layer": {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "weights").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match="weights"):
        files.load_weights(tmp_path / "weights")


def test_temporary_file_of_another_process_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f".file.{os.getpid() + 1}.tmp"
    other.write_text("being written")
    files.write_text(tmp_path / "file", "text")
    assert other.read_text() == "being written"
