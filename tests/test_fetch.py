"""Getting raw data: offline digits, mirrors that fail in every way, resuming, and never a half-replaced folder."""

import gzip
import hashlib
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from ml import files
from ml.errors import UserError, exit_on_user_error
from ml.task import dataset, fetch
from ml.task.dataset import RAW_FILES, TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS, read_dataset

WriteRaw = Callable[..., Path]
NAME = "fashion-mnist"  # the tables of this name are replaced by those of small fakes
COUNTS = (60, 24)


@dataclass
class Mirror:
    """What the server does, by path, and what it was asked for: (path, Range header)."""

    url: str
    contents: dict[str, bytes] = field(default_factory=dict)
    cut_after: dict[str, int] = field(default_factory=dict)  # bytes of one answer, once
    without_range: bool = False
    encoding: str | None = None  # the Content-Encoding to claim
    asked: list[tuple[str, str | None]] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    mirror: Mirror

    def do_GET(self) -> None:
        mirror, path, wanted = self.mirror, self.path.lstrip("/"), self.headers["Range"]
        mirror.asked.append((path, wanted))
        content = mirror.contents.get(path)
        if content is None:
            self.send_error(404)
            return
        start = 0 if wanted is None or mirror.without_range else int(wanted[len("bytes=") : -1])
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if mirror.encoding:
            self.send_header("Content-Encoding", mirror.encoding)
        self.end_headers()
        length = mirror.cut_after.pop(path, len(content))
        self.wfile.write(content[start : start + length])

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(fetch, "PIECE", 1024)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        mirror = Mirror(f"http://127.0.0.1:{server.server_port}")
        Handler.mirror = mirror
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield mirror
        server.shutdown()
        thread.join()


def packed(folder: Path) -> dict[str, bytes]:
    return {f"{file}.gz": gzip.compress((folder / file).read_bytes(), mtime=0) for file in RAW_FILES}


@pytest.fixture
def published(tmp_path: Path, write_raw: WriteRaw, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small set under NAME, served by `mirror`, whose URL is the only one known. The folder of its raw files."""
    folder = write_raw(tmp_path / "published", train=COUNTS[0], test=COUNTS[1], shape=(28, 28))
    monkeypatch.setitem(dataset.PUBLISHED_COUNTS, NAME, COUNTS)
    mirror.contents |= packed(folder)
    know(monkeypatch, mirror.url)
    return folder


def know(monkeypatch: pytest.MonkeyPatch, *urls: str, **sets: Path) -> None:
    """Make `urls` the known mirrors; checksums are those of what is published now, or of each named set."""
    md5 = {path: hashlib.md5(content).hexdigest() for path, content in Handler.mirror.contents.items()}
    sums = {
        name: {f: hashlib.md5(c).hexdigest() for f, c in packed(path).items()} for name, path in sets.items()
    }
    monkeypatch.setattr(fetch, "torchvision_source", lambda name: (list(urls), sums.get(name, md5)))


def raw(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def old_data(folder: Path) -> dict[str, bytes]:
    """Something in the target folder that a call that fails must not touch."""
    folder.mkdir()
    for file in (*RAW_FILES, "notes.txt"):
        (folder / file).write_text(f"old {file}")
    return raw(folder)


# Digits


def test_digits_are_the_same_bytes_everywhere_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*arguments: Any, **options: Any) -> None:
        raise AssertionError("digits must not use the network")

    monkeypatch.setattr("socket.socket.connect", no_network)
    fetch.fetch("digits", tmp_path / "data")
    assert {file: files.md5(tmp_path / "data" / file) for file in RAW_FILES} == dataset.RAW_MD5["digits"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
    found = read_dataset(tmp_path / "data", "digits")
    assert (len(found.train), len(found.test)) == (1437, 360)
    assert found.train.images.shape[1:] == (28, 28) and not set(found.train.ids) & set(found.test.ids)


def test_enlarged_digits_are_those_of_bilinear_interpolation() -> None:
    import torch

    small = np.random.RandomState(0).randint(0, 17, (20, 8, 8))
    expected = torch.nn.functional.interpolate(
        torch.tensor(small[:, None] * (255 / 16)), size=(28, 28), mode="bilinear", align_corners=False
    )
    assert np.abs(fetch.enlarge(small) - expected[:, 0].numpy()).max() <= 0.5001


def test_digits_replace_what_was_in_the_folder_and_leave_other_files(tmp_path: Path) -> None:
    old_data(tmp_path / "data")
    fetch.fetch("digits", tmp_path / "data")
    read_dataset(tmp_path / "data", "digits")
    assert (tmp_path / "data" / "notes.txt").read_text() == "old notes.txt"


# Mirrors


def test_whole_set_is_downloaded_verified_and_unpacked(
    tmp_path: Path, published: Path, mirror: Mirror
) -> None:
    fetch.fetch(NAME, tmp_path / "data")
    assert raw(tmp_path / "data") == raw(published)
    assert mirror.asked == [(f"{file}.gz", None) for file in RAW_FILES]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "published"]


def test_second_mirror_is_used_when_the_first_has_not_the_file(
    tmp_path: Path, published: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    know(monkeypatch, f"{mirror.url}/gone/", mirror.url)
    fetch.fetch(NAME, tmp_path / "data")
    assert raw(tmp_path / "data") == raw(published)
    assert mirror.asked[:2] == [(f"gone/{TRAIN_IMAGES}.gz", None), (f"{TRAIN_IMAGES}.gz", None)]


def test_given_mirror_is_used_alone(tmp_path: Path, published: Path, mirror: Mirror) -> None:
    mirror.contents |= {f"own/{path}": content for path, content in mirror.contents.items()}
    fetch.fetch(NAME, tmp_path / "data", mirror=f"{mirror.url}/own")
    assert raw(tmp_path / "data") == raw(published)
    assert {path.partition("/")[0] for path, _ in mirror.asked} == {"own"}


def test_download_that_was_cut_goes_on_where_it_stopped(
    tmp_path: Path, published: Path, mirror: Mirror
) -> None:
    before = old_data(tmp_path / "data")
    mirror.cut_after[f"{TRAIN_IMAGES}.gz"] = 10_000
    with pytest.raises(UserError, match=f"{TRAIN_IMAGES}.gz of {NAME} could not be downloaded"):
        fetch.fetch(NAME, tmp_path / "data")
    assert raw(tmp_path / "data") == before

    fetch.fetch(NAME, tmp_path / "data")
    path, wanted = mirror.asked[1]
    assert path == f"{TRAIN_IMAGES}.gz" and wanted is not None
    assert 5_000 < int(wanted.removeprefix("bytes=").removesuffix("-")) <= 10_000
    assert raw(tmp_path / "data") == raw(published) | {"notes.txt": before["notes.txt"]}


def test_download_that_was_cut_starts_afresh_from_a_server_without_ranges(
    tmp_path: Path, published: Path, mirror: Mirror
) -> None:
    mirror.without_range = True
    mirror.cut_after[f"{TRAIN_IMAGES}.gz"] = 10_000
    with pytest.raises(UserError):
        fetch.fetch(NAME, tmp_path / "data")
    fetch.fetch(NAME, tmp_path / "data")
    assert mirror.asked[1][1] is not None
    assert raw(tmp_path / "data") == raw(published)


def test_download_that_was_whole_but_not_unpacked_is_not_downloaded_again(
    tmp_path: Path, published: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(packed: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(fetch, "unpack", killed)
        with pytest.raises(KeyboardInterrupt):
            fetch.fetch(NAME, tmp_path / "data")
    fetch.fetch(NAME, tmp_path / "data")
    size = len(mirror.contents[f"{TRAIN_IMAGES}.gz"])
    assert mirror.asked[1] == (f"{TRAIN_IMAGES}.gz", f"bytes={size}-")
    assert raw(tmp_path / "data") == raw(published)


def test_wrong_content_is_not_used_and_nothing_is_replaced(
    tmp_path: Path, published: Path, mirror: Mirror
) -> None:
    before = old_data(tmp_path / "data")
    right = mirror.contents[f"{TEST_LABELS}.gz"]
    wrong = mirror.contents[f"{TEST_LABELS}.gz"] = gzip.compress(b"something else", mtime=0)
    with pytest.raises(UserError) as caught:
        fetch.fetch(NAME, tmp_path / "data")
    for md5 in (hashlib.md5(right).hexdigest(), hashlib.md5(wrong).hexdigest()):
        assert md5 in str(caught.value)
    assert raw(tmp_path / "data") == before

    mirror.contents[f"{TEST_LABELS}.gz"] = right
    fetch.fetch(NAME, tmp_path / "data")
    assert raw(tmp_path / "data") == raw(published) | {"notes.txt": before["notes.txt"]}


def test_wrong_content_of_one_mirror_is_replaced_by_that_of_the_next(
    tmp_path: Path, published: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    know(monkeypatch, f"{mirror.url}/bad", mirror.url)
    mirror.contents |= {f"bad/{file}.gz": b"<html>log in first</html>" * 100 for file in RAW_FILES}
    fetch.fetch(NAME, tmp_path / "data")
    assert raw(tmp_path / "data") == raw(published)


@pytest.mark.parametrize("without_range", [False, True])
def test_beginning_of_wrong_content_does_not_spoil_the_download_from_a_right_mirror(
    tmp_path: Path, published: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch, without_range: bool
) -> None:
    mirror.without_range = without_range
    know(monkeypatch, f"{mirror.url}/bad", mirror.url)
    mirror.contents[f"bad/{TRAIN_IMAGES}.gz"] = bytes(20_000)
    mirror.cut_after[f"bad/{TRAIN_IMAGES}.gz"] = 10_000
    fetch.fetch(NAME, tmp_path / "data")
    assert raw(tmp_path / "data") == raw(published)


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip"])
def test_server_that_calls_the_packing_an_encoding_does_no_harm(
    tmp_path: Path, published: Path, mirror: Mirror, encoding: str
) -> None:
    mirror.encoding = encoding
    fetch.fetch(NAME, tmp_path / "data")
    assert raw(tmp_path / "data") == raw(published)


def test_each_mirror_that_failed_is_named_with_its_answer_and_both_remedies(
    tmp_path: Path, published: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    retry = fetch.Retry
    monkeypatch.setattr(fetch, "Retry", lambda **options: retry(**options | {"backoff_factor": 0}))
    urls = [f"{mirror.url}/gone", "http://127.0.0.1:9", f"{mirror.url}/bad"]
    know(monkeypatch, *urls)
    mirror.contents[f"bad/{TRAIN_IMAGES}.gz"] = b"something else"
    before = old_data(tmp_path / "data")
    with pytest.raises(UserError) as caught:
        fetch.fetch(NAME, tmp_path / "data")
    lines = str(caught.value).splitlines()
    for url, answer in zip(urls, ("404", "refused", "expected MD5")):
        assert any(line.startswith(f"  {url}/{TRAIN_IMAGES}.gz: ") and answer in line for line in lines), url
    assert "dvc pull data.dvc" in str(caught.value)
    assert f"fetch {NAME} --to data --mirror URL-OR-FOLDER" in str(caught.value)
    assert raw(tmp_path / "data") == before


# Interruptions and leftovers


def test_interrupted_call_leaves_the_target_unchanged_and_the_next_goes_on(
    tmp_path: Path, published: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = old_data(tmp_path / "data")
    resume = fetch.resume_download

    def interrupted(url: str, path: Path) -> None:
        if path.name == f"{TEST_IMAGES}.gz":
            raise KeyboardInterrupt
        resume(url, path)

    with monkeypatch.context() as context:
        context.setattr(fetch, "resume_download", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch.fetch(NAME, tmp_path / "data")
    assert raw(tmp_path / "data") == before

    fetch.fetch(NAME, tmp_path / "data")
    assert [path for path, _ in mirror.asked] == [f"{file}.gz" for file in RAW_FILES]
    assert raw(tmp_path / "data") == raw(published) | {"notes.txt": before["notes.txt"]}


def test_files_of_an_interrupted_call_for_one_set_are_not_taken_for_those_of_another(
    tmp_path: Path, published: Path, mirror: Mirror, write_raw: WriteRaw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fashion-MNIST and KMNIST agree in counts and sizes, so nothing would show that their files are mixed."""
    monkeypatch.setitem(dataset.PUBLISHED_COUNTS, "kmnist", COUNTS)
    zeros = np.zeros((COUNTS[0], 28, 28), np.uint8)
    other = write_raw(tmp_path / "other", train=COUNTS[0], test=COUNTS[1], shape=(28, 28), train_images=zeros)
    know(monkeypatch, mirror.url, **{NAME: published, "kmnist": other})
    del mirror.contents[f"{TEST_LABELS}.gz"]
    with pytest.raises(UserError):
        fetch.fetch(NAME, tmp_path / "data")

    mirror.contents |= packed(other)
    fetch.fetch("kmnist", tmp_path / "data")
    assert raw(tmp_path / "data") == raw(other)


def test_wrong_files_of_a_folder_do_not_stand_in_the_way_of_the_next_call(
    tmp_path: Path, published: Path, mirror: Mirror, write_raw: WriteRaw
) -> None:
    wrong = write_raw(tmp_path / "wrong", train=9, test=9)
    with pytest.raises(UserError, match="has 60 labels here, found 9"):
        fetch.fetch(NAME, tmp_path / "data", mirror=str(wrong))
    assert not (tmp_path / "data").exists()
    fetch.fetch(NAME, tmp_path / "data")
    assert raw(tmp_path / "data") == raw(published)


# A folder as mirror


@pytest.mark.parametrize(
    "unpacked", [RAW_FILES, (), (TRAIN_IMAGES, TEST_LABELS)], ids=["raw", "packed", "mixed"]
)
def test_folder_with_raw_or_packed_files_is_copied(
    tmp_path: Path, published: Path, mirror: Mirror, unpacked: tuple[str, ...]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for file in RAW_FILES:
        if file in unpacked:
            shutil.copy(published / file, folder / file)
        else:
            (folder / f"{file}.gz").write_bytes(mirror.contents[f"{file}.gz"])
    content = raw(folder)
    fetch.fetch(NAME, tmp_path / "data", mirror=str(folder))
    assert raw(tmp_path / "data") == raw(published)
    assert raw(folder) == content and mirror.asked == []


def test_folder_without_one_of_the_files_is_named_with_it(tmp_path: Path, published: Path) -> None:
    (published / TEST_LABELS).unlink()
    before = old_data(tmp_path / "data")
    with pytest.raises(UserError, match=f"published has neither {TEST_LABELS} nor {TEST_LABELS}.gz"):
        fetch.fetch(NAME, tmp_path / "data", mirror=str(published))
    assert raw(tmp_path / "data") == before


@pytest.mark.parametrize("damage", ["other", "cut", "flipped"])
def test_packed_file_that_cannot_be_unpacked_is_named(
    tmp_path: Path, published: Path, mirror: Mirror, damage: str
) -> None:
    content = mirror.contents[f"{TRAIN_LABELS}.gz"]
    damaged = {"other": b"not packed", "cut": content[:-20], "flipped": content[:12] + b"\xff" + content[13:]}
    (published / TRAIN_LABELS).unlink()
    (published / f"{TRAIN_LABELS}.gz").write_bytes(damaged[damage])
    with pytest.raises(UserError, match=f"published/{TRAIN_LABELS}.gz could not be unpacked"):
        fetch.fetch(NAME, tmp_path / "data", mirror=str(published))
    assert not (tmp_path / "data").exists()


# Places, and the command


def test_current_folder_can_be_the_target(
    tmp_path: Path, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    fetch.fetch(NAME, Path("."))
    assert raw(tmp_path / "here") == raw(published)


def test_file_in_place_of_the_target_folder_is_a_user_error(tmp_path: Path, published: Path) -> None:
    (tmp_path / "data").write_text("a file")
    with pytest.raises(UserError, match="data could not be written"):
        fetch.fetch(NAME, tmp_path / "data")
    assert (tmp_path / "data").read_text() == "a file"


def test_command_exits_1_with_the_message(
    tmp_path: Path, published: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["ml.task.dataset", "fetch", NAME, "--to", str(tmp_path / "data"), "--mirror"]
    monkeypatch.setattr("sys.argv", [*arguments, str(published)])
    exit_on_user_error(dataset.main)
    assert raw(tmp_path / "data") == raw(published) and "verified" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*arguments, str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        exit_on_user_error(dataset.main)
    assert caught.value.code == 1 and "has neither" in capsys.readouterr().err


def test_known_sets_have_mirrors_and_a_checksum_for_each_file() -> None:
    for name in ("mnist", "fashion-mnist", "kmnist"):
        mirrors, md5 = fetch.torchvision_source(name)
        assert mirrors and all(mirror.startswith("http") for mirror in mirrors)
        assert set(md5) == {f"{file}.gz" for file in RAW_FILES}


def test_reason_is_the_innermost_cause_on_one_line() -> None:
    try:
        try:
            raise OSError("no route\nto host")
        except OSError as error:
            raise requests.ConnectionError("outer") from error
    except requests.ConnectionError as error:
        assert fetch.reason(error) == "OSError: no route"
