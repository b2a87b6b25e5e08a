"""A folder of images to a CSV: every image once, in order, whatever the files are and however often it was killed."""

import csv
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.serving import make_bundle, make_images, png

TAG = "model-v1.0.0"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_bundle(folder, TAG)
    return folder


def environment(models: Path, **more: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SERVE_", "MODEL_"))}
    return {**clean, "OMP_NUM_THREADS": "1", "MODEL_STORE": str(models), **more}


def command(folder: Path, to: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "ml.serve.batch", str(folder), "--to", str(to), "--processes", "2", *more]


def batch(
    models: Path, folder: Path, to: Path, *more: str, **variables: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(folder, to, *more),
        env=environment(models, **variables),
        capture_output=True,
        text=True,
        timeout=120,
    )


def rows(to: Path) -> list[dict[str, str]]:
    with open(to, newline="") as file:
        return list(csv.DictReader(file))


def write_many(folder: Path, count: int) -> list[str]:
    images = make_images(64)
    contents = [png(image) for image in images]
    paths = [f"{number % 7}/{number:05d}.png" for number in range(count)]
    for number, path in enumerate(paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(contents[number % 64])
    return sorted(paths)


def test_batch_answers_every_format_as_the_model_does_and_lists_bad_files(
    models: Path, tmp_path: Path
) -> None:
    import onnxruntime

    folder, to = tmp_path / "images", tmp_path / "out.csv"
    folder.mkdir()
    images = make_images(6)
    (folder / "a.png").write_bytes(png(images[0]))
    (folder / "b.bmp").write_bytes(png(images[1], "BMP"))
    (folder / "c.webp").write_bytes(png(images[2], "WEBP", lossless=True))
    (folder / "d.idx").write_bytes(struct.pack(">BBBBIII", 0, 0, 8, 3, 2, 28, 28) + images[3:5].tobytes())
    np.save(folder / "e.npy", images[5])
    (folder / "f.jpg").write_bytes(png(255 - images[0].repeat(4, 0).repeat(4, 1), "JPEG", quality=95))
    (folder / "notes.txt").write_text("not an image")
    (folder / "torn.png").write_bytes(png(images[0])[:60])
    (folder / "empty.png").write_bytes(b"")
    (folder / "dangling.png").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.png")
    (folder / ".hidden").write_text("left out")
    (
        folder / 'odd\n,"name\udce4.png'.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    ).write_bytes(png(images[0]))

    done = batch(models, folder, to)

    assert done.returncode == 0, done.stderr
    found = rows(to)
    good = [row for row in found if not row["error"]]
    assert [(row["file"], row["image"]) for row in good] == [
        ("a.png", "0"),
        ("b.bmp", "0"),
        ("c.webp", "0"),
        ("d.idx", "0"),
        ("d.idx", "1"),
        ("e.npy", "0"),
        ("f.jpg", "0"),
        ('odd\\n,"name\\udce4.png', "0"),
    ]
    assert {row["file"] for row in found if row["error"]} == {
        "notes.txt",
        "torn.png",
        "empty.png",
        "dangling.png",
        "pipe.png",
    }
    session = onnxruntime.InferenceSession(models / TAG / "model.onnx")
    expected = session.run(None, {"images": images})[0]
    for row, wanted in zip(good[:6], expected):
        assert [float(row[f"p_{number}"]) for number in range(10)] == pytest.approx(wanted, abs=1e-4)
        assert int(row["class"]) == wanted.argmax() and row["model"] == TAG
        assert row["done"] == ("colours to grey" if row["file"] == "c.webp" else "")
    assert "inverted" in good[6]["done"] and "resized" in good[6]["done"]
    assert good[6]["class"] == good[0]["class"]
    assert "8 images of 7 files" in done.stdout and "5 bad files" in done.stdout and "torn.png" in done.stdout
    assert not (tmp_path / "out.csv.part").exists()


@pytest.mark.slow
def test_batch_killed_again_and_again_ends_in_the_bytes_of_a_run_in_one_go(
    models: Path, tmp_path: Path
) -> None:
    folder, to, whole = tmp_path / "images", tmp_path / "out.csv", tmp_path / "whole.csv"
    paths = write_many(folder, 3000)
    (folder / "3" / "bad.png").write_text("bad")
    assert batch(models, folder, whole).returncode == 0
    part, kills, random = tmp_path / "out.csv.part", 0, np.random.default_rng(0)
    while kills < 3:
        before = part.stat().st_size if part.exists() else 0
        process = subprocess.Popen(
            command(folder, to), env=environment(models), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        workers: list[psutil.Process] = []
        while process.poll() is None and not (part.exists() and part.stat().st_size > before + 30_000):
            time.sleep(0.005)
            workers = workers or psutil.Process(process.pid).children()
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        kills += 1
        assert not to.exists()
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive, "a worker outlived the process that was killed"
        if part.exists():  # as a full disk or a crash of the machine would leave it
            os.truncate(part, part.stat().st_size - int(random.integers(0, 90)))
    assert kills >= 2
    done = batch(models, folder, to)
    assert done.returncode == 0 and "going on after" in done.stderr
    assert to.read_bytes() == whole.read_bytes()
    assert sorted(row["file"] for row in rows(to)) == sorted([*paths, "3/bad.png"])


def begun(models: Path, folder: Path, to: Path, lines: int) -> Path:
    """out.csv.part as a killed run leaves it."""
    assert batch(models, folder, to).returncode == 0
    part = to.with_name(to.name + ".part")
    part.write_text("".join(to.read_text().splitlines(keepends=True)[:lines]))
    to.unlink()
    return part


def test_batch_refuses_to_go_on_with_another_model_or_other_files(models: Path, tmp_path: Path) -> None:
    folder, to = tmp_path / "images", tmp_path / "out.csv"
    write_many(folder, 20)
    part = begun(models, folder, to, 12)
    text = part.read_text()

    part.write_text(text.replace(TAG, "model-v0.9.0"))
    other = batch(models, folder, to)
    assert other.returncode == 1 and "begun with model model-v0.9.0" in other.stderr

    part.write_text(text)
    (folder / "0" / "00000.png").rename(folder / "0" / "99999.png")
    changed = batch(models, folder, to)
    assert changed.returncode == 1 and "added or removed" in changed.stderr
    assert not to.exists() and part.read_text() == text


def test_batch_leaves_its_own_output_out_and_says_what_cannot_be(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    write_many(folder, 3)
    for _ in range(2):
        done = batch(models, folder, folder / "out.csv")
        assert done.returncode == 0 and "3 images of 3 files" in done.stdout
    missing = batch(models, tmp_path / "none", tmp_path / "out.csv")
    assert missing.returncode == 1 and "is not a folder" in missing.stderr
    nowhere = batch(models, folder, tmp_path / "no" / "out.csv")
    assert nowhere.returncode == 1 and "a folder that exists" in nowhere.stderr
    model = batch(models, folder, tmp_path / "out.csv", MODEL_TAG="model-v9.9.9")
    assert model.returncode == 1 and "model-v9.9.9" in model.stderr and "Traceback" not in model.stderr


def test_batch_of_an_empty_folder_is_a_header(models: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert batch(models, tmp_path / "empty", tmp_path / "out.csv").returncode == 0
    assert (tmp_path / "out.csv").read_text().startswith("file,image,class,probability,p_0,")
    assert rows(tmp_path / "out.csv") == []


@pytest.mark.slow
def test_batch_needs_no_more_memory_for_ten_times_the_images(models: Path, tmp_path: Path) -> None:
    def peak(count: int) -> float:
        folder = tmp_path / str(count)
        write_many(folder, count)
        process = subprocess.Popen(
            command(folder, tmp_path / f"{count}.csv"), env=environment(models), stderr=subprocess.DEVNULL
        )
        highest = 0.0
        while process.poll() is None:
            try:
                tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
                highest = max(highest, sum(each.memory_info().rss for each in tree) / 1e6)
            except psutil.NoSuchProcess:
                pass
            time.sleep(0.02)
        assert process.returncode == 0
        return highest

    few, many = peak(600), peak(6000)
    assert many < few + 20  # MB, over three processes


def test_batch_stops_where_a_class_name_or_problem_could_break_a_row() -> None:
    from ml.serve.batch import csv_line, printable

    names: list[Any] = ['a"b,c', "new\nline", "tab\t", "é", "\\n", "\u2028"]
    line = csv_line([printable(name) for name in names])
    assert line.count("\n") == 1 and len(line.splitlines()) == 1
    assert len({printable(name) for name in names}) == len(names)
