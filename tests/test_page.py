"""The page at `/`, in a real browser, against a real server: draw, and see what the model says."""

import re
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ml.serve.page import page
from tests.serving import Served, make_bundle, make_flat_bundle, served

CSP = "content-security-policy"


def test_page_takes_nothing_from_elsewhere_and_its_policy_would_not_let_it() -> None:
    body, headers = page(28, 28)
    text = body.decode()
    assert not re.search(
        r"(?i)(https?:)?//[\w-]+\.|@import|url\(|<link|<iframe|\son\w+=|\sstyle=|innerHTML|eval\(", text
    )
    policy = headers[CSP]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    assert "connect-src 'self'" in policy and "frame-ancestors 'none'" in policy


def test_page_policy_follows_the_script() -> None:
    from ml.serve.page import source

    assert source(b"<script>1</script>", b"script") != source(b"<script>2</script>", b"script")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that knows real handwritten digits."""
    import torch

    from ml import files
    from ml.export import export_onnx, export_program, golden
    from ml.task import fetch
    from ml.task.dataset import TRAIN_IMAGES, TRAIN_LABELS, read_idx
    from ml.task.model import MiniCNN
    from tests.serving import write_experiment

    folder = tmp_path_factory.mktemp("digits")
    fetch.write_digits(folder / "data")
    images = np.array(read_idx(folder / "data" / TRAIN_IMAGES, 3))
    labels = torch.from_numpy(np.array(read_idx(folder / "data" / TRAIN_LABELS, 1)).astype(np.int64))
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # another number makes another model, on whose reading of a drawn line a test hangs
    torch.manual_seed(0)
    network = MiniCNN(28, 10, (8, 16), 0.3, 0.36)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.005)
    for step in range(400):
        chosen = torch.randint(len(images), (64,))
        shifted = torch.from_numpy(images)[chosen].roll((step % 3 - 1, step // 3 % 3 - 1), (1, 2))
        loss = torch.nn.functional.nll_loss(network(shifted), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    network.eval()
    target = folder / "models" / "model-v1.0.0"
    target.mkdir(parents=True)
    sample = images[:64]
    (target / "model.onnx").write_bytes(export_onnx(export_program(network, sample), network, sample))
    files.save_arrays(target / "golden.npz", **vars(golden(network, images[:20])))
    write_experiment(target, dataset="digits")
    return folder / "models"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    if driver is None or chromium is None:
        pytest.skip("chromedriver or chromium missing: apt-get install chromium chromium-driver")
    options = ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=900,700",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = Chrome(options, ChromeService(driver))
    yield chrome
    chrome.quit()


@pytest.fixture
def server(digits: Path, tmp_path: Path) -> Iterator[Served]:
    with served(digits, tmp_path / "state") as running:
        yield running


SEVEN = [(70, 60), (210, 60), (120, 230)]
ONE = [(140, 50), (140, 230)]


def draw(browser: Any, points: list[tuple[int, int]], kind: str = "mouse") -> None:
    """Through `points` of the paper with the button (or finger) held down."""
    from selenium.webdriver.common.actions.action_builder import ActionBuilder
    from selenium.webdriver.common.actions.pointer_input import PointerInput
    from selenium.webdriver.common.by import By

    paper = browser.find_element(By.ID, "paper")
    pointer = ActionBuilder(browser, mouse=PointerInput(kind, kind), duration=30)
    action = pointer.pointer_action
    steps = []
    for (x, y), (to_x, to_y) in zip(points, points[1:]):
        steps += [(x + (to_x - x) * part // 6, y + (to_y - y) * part // 6) for part in range(7)]
    action.move_to(paper, steps[0][0] - 140, steps[0][1] - 140).pointer_down()
    for x, y in steps[1:]:
        action.move_to(paper, x - 140, y - 140)
    action.pointer_up()
    pointer.perform()


def wait_for(browser: Any, expression: str) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 20).until(lambda each: each.execute_script(f"return {expression}"))


def complaints(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if "favicon" not in entry["message"]]


@pytest.mark.slow
def test_digit_drawn_with_mouse_or_finger_is_answered_with_bars_and_model(
    browser: Any, server: Served, tmp_path: Path
) -> None:
    browser.get(server.address)
    complaints(browser)
    for points, digit, kind in ((SEVEN, "7", "mouse"), (ONE, "1", "touch")):
        draw(browser, points, kind)
        wait_for(browser, f"document.querySelector('#answer strong')?.textContent === '{digit}' && !waiting")
        widths = wait_for(browser, "[...document.querySelectorAll('#bars progress')].map(bar => bar.value)")
        names = browser.execute_script(
            "return [...document.querySelectorAll('#bars th')].map(each => each.textContent)"
        )
        assert names == [str(number) for number in range(10)]
        assert sum(widths) == pytest.approx(1, abs=1e-3) and int(np.argmax(widths)) == int(digit)
        assert "model-v1.0.0" in browser.execute_script("return made.textContent")
        browser.save_screenshot(str(tmp_path / f"{digit}.png"))
        browser.execute_script("document.getElementById('clear').click()")
        assert wait_for(browser, "answer.textContent === 'Draw something.' && !bars.children.length")
    assert complaints(browser) == []


@pytest.mark.slow
def test_chosen_picture_is_answered_and_a_bad_one_explained(
    browser: Any, server: Served, tmp_path: Path
) -> None:
    from selenium.webdriver.common.by import By

    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"nothing")
    (tmp_path / "seven.bmp").write_bytes(bitmap())
    browser.get(server.address)
    browser.find_element(By.ID, "file").send_keys(str(tmp_path / "bad.png"))
    assert "no readable PNG" in wait_for(browser, "answer.className === 'error' && answer.textContent")
    browser.find_element(By.ID, "file").send_keys(str(tmp_path / "seven.bmp"))
    assert wait_for(
        browser, "answer.className === '' && document.querySelector('#answer strong')?.textContent"
    )
    assert "resized" in browser.execute_script("return made.textContent")


def bitmap() -> bytes:
    """A 40×40 BMP, written by hand: a white bar on black."""
    rows = b"".join((b"\0\0\0" * 18 + b"\xff\xff\xff" * 4 + b"\0\0\0" * 18) for _ in range(40))
    return (
        struct.pack(
            "<2sIHHIIiiHHIIiiII", b"BM", 54 + len(rows), 0, 0, 54, 40, 40, 40, 1, 24, 0, len(rows), 0, 0, 0, 0
        )
        + rows
    )


@pytest.mark.slow
def test_page_shows_class_names_as_text_whatever_they_hold(browser: Any, tmp_path: Path) -> None:
    names = [
        "<img src=x onerror=document.title='owned'>",
        "<script>document.title='owned'</script>",
        "a very long name " * 5,
    ]
    names += [f"class {number}" for number in range(7)]
    make_bundle(tmp_path / "models", "model-v1.0.0", class_names=names)
    with served(tmp_path / "models", tmp_path / "state") as running:
        browser.get(running.address)
        draw(browser, ONE)
        shown = wait_for(
            browser,
            "bars.children.length && [...document.querySelectorAll('#bars th')].map(each => each.textContent)",
        )
        assert shown == names
        assert browser.title == "Draw and see the answer"
        assert browser.execute_script("return document.querySelectorAll('img, #bars script').length") == 0


@pytest.mark.slow
def test_page_says_when_the_server_is_gone(browser: Any, digits: Path, tmp_path: Path) -> None:
    with served(digits, tmp_path / "state") as running:
        browser.get(running.address)
    draw(browser, ONE)
    assert "does not answer" in wait_for(browser, "answer.className === 'error' && answer.textContent")


@pytest.mark.slow
def test_page_of_a_model_of_measurements_asks_for_numbers(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By

    make_flat_bundle(tmp_path / "models", "model-v1.0.0")
    with served(tmp_path / "models", tmp_path / "state") as running:
        browser.get(running.address)
        complaints(browser)
        assert not browser.find_element(By.ID, "paper").is_displayed()
        values, ask = browser.find_element(By.ID, "values"), browser.find_element(
            By.CSS_SELECTOR, "form button"
        )
        values.send_keys("51, 35 14")
        ask.click()
        assert "4 whole numbers" in wait_for(browser, "answer.className === 'error' && answer.textContent")
        values.send_keys("; 2")
        ask.click()
        shown = wait_for(browser, "document.querySelector('#answer strong')?.textContent")
        expected = running.post("/invocations", json={"inputs": [[[51, 35, 14, 2]]]}).json()["predictions"][0]
        assert shown == ["setosa", "versicolor", "virginica"][int(np.argmax(expected))]
        assert complaints(browser) == []
