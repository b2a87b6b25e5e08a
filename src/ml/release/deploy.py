"""Deploy a released model, look whether it answers as it should, and go back to the one before if it does not.

    python -m ml.release.deploy                  # after the release and image jobs
    python -m ml.release.deploy --smoke-only     # only look at what SERVE_URL serves

What deploys is the team's own: DEPLOY_COMMAND (a shell command), DEPLOY_WEBHOOK (a POST of JSON), or, with neither,
the running server at SERVE_URL, which swaps its model. docs/release.md has the variables.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import requests

from ml import bundle, files
from ml.errors import UserError, exit_on_user_error
from ml.release import access, gitlab_release
from ml.release.version import parse_version
from ml.settings import Settings, load_settings

TOLERANCE = 1e-4  # of each golden probability, as the bundle promises
BY_DIGEST = re.compile(r"[^\s@]+@sha256:[0-9a-f]{64}")
ATTEMPT_SECONDS = 10.0  # for one request
PAUSE = 1.0  # s, between two looks at a server that is not there yet
HOOK_SECONDS = 3600  # for DEPLOY_COMMAND


@dataclass(frozen=True)
class Model:
    """What is to run: a release's tag, the sha256 of its model.onnx, and its image by digest."""

    tag: str
    sha256: str = ""
    image: str = ""


@dataclass(frozen=True)
class Deployed:
    """A release as MODEL_TAG, MODEL_SHA256 and IMAGE of the job describe it, and the one to go back to."""

    model: Model
    folder: Path  # of its bundle
    previous: Model | None


def read_job(settings: Settings, environment: dict[str, str]) -> Deployed | None:
    """None when no model was released. Raises UserError when its bundle is not here, or is another model's."""
    tag = environment.get("MODEL_TAG", "")
    if not tag:
        return None
    folder = Path(environment.get("BUNDLE") or f"models/{tag}")
    path = folder / bundle.EXPERIMENT
    if not path.is_file():
        raise UserError(f"{path} is missing. Take over models/ from the release job (needs: artifacts).")
    described = bundle.parse_experiment(path.read_bytes(), str(path))
    digest = environment.get("MODEL_SHA256") or described.model.sha256
    if described.tag != tag or described.model.sha256 != digest:
        raise UserError(
            f"{path} is of {described.tag} (model {described.model.sha256}), and the job is to deploy {tag} "
            f"(model {digest}). Nothing was deployed."
        )
    for name, image in (("IMAGE", settings.image), ("PREVIOUS_IMAGE", settings.previous_image)):
        if image and not BY_DIGEST.fullmatch(image):
            raise UserError(
                f"{name} is {image!r:.200}, and should end in @sha256:…: a tag may be moved, and nobody could go back to "
                "it. The image job's log has the digest."
            )
    model = Model(tag, digest, settings.image or "")
    given = environment.get("PREVIOUS_MODEL_TAG", "")
    previous = last_good(settings, model) or (
        Model(given, "", settings.previous_image or "") if given else None
    )
    return Deployed(model, folder, previous)


def last_good(settings: Settings, model: Model) -> Model | None:
    """The image that was last deployed and answered as it should: of this release, else of the one before it."""
    project = access.connect(settings)
    if project is None:
        return None
    with access.explained(project, "Looking for the release before"):
        found = []
        for release in project.all("/releases"):
            name, image = str(release["tag_name"]), gitlab_release.image_of(release)
            version, own = parse_version(name), parse_version(model.tag)
            # a link that no deployment has made is no image to go back to
            by_digest = image is not None and BY_DIGEST.fullmatch(image)
            if image and by_digest and image != model.image and version and own and version <= own:
                found.append((version, Model(name, "", image)))
    return max(found, key=lambda each: each[0])[1] if found else None


# ---- The hook


def deploy(settings: Settings, model: Model) -> str:
    """Bring `model` to where the team wants it; what was done. Raises UserError when the hook fails."""
    if settings.deploy_command:
        return by_command(settings.deploy_command, model)
    if settings.deploy_webhook:
        return by_webhook(settings.deploy_webhook, settings, model)
    assert settings.serve_url is not None
    return by_swap(settings.serve_url, settings, model)


def fields(model: Model) -> dict[str, str]:
    return {"MODEL_TAG": model.tag, "MODEL_SHA256": model.sha256, "IMAGE": model.image}


def by_command(command: str, model: Model) -> str:
    try:
        done = subprocess.run(["sh", "-c", command], env=os.environ | fields(model), timeout=HOOK_SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(f"DEPLOY_COMMAND did not end within {HOOK_SECONDS} s.") from None
    if done.returncode:
        raise UserError(f"DEPLOY_COMMAND ended with exit code {done.returncode}. Its output is above.")
    return "DEPLOY_COMMAND ended well"


def by_webhook(url: str, settings: Settings, model: Model) -> str:
    answer = request(
        "POST",
        url,
        settings.deploy_webhook_token,
        {name.lower(): value for name, value in fields(model).items()},
    )
    if not answer.ok:
        raise UserError(
            f"DEPLOY_WEBHOOK answered {answer.status_code} ({answer.text[:200]!r}). Look into its log."
        )
    return f"DEPLOY_WEBHOOK answered {answer.status_code}"


def by_swap(url: str, settings: Settings, model: Model) -> str:
    """The running server loads the model from its own store. Raises UserError with what it says otherwise."""
    body = {"tag": model.tag} | ({"sha256": model.sha256} if model.sha256 else {})
    answer = request("POST", f"{url}/replace_ml_model", settings.serve_token, body)
    if answer.status_code in (401, 403):
        raise UserError(f"{url} answered {answer.status_code}. SERVE_TOKEN has to be the server's own.")
    if not answer.ok:
        raise UserError(
            f"{url} did not take {model.tag}: {answer.status_code} ({answer.text[:300]!r}). "
            "Look whether its MODEL_STORE has the release."
        )
    return f"{url} swapped to {model.tag}"


def request(method: str, url: str, token: Any = None, body: Any = None) -> requests.Response:
    """Raises UserError when there is no answer at all."""
    headers = {"Authorization": f"Bearer {token.get_secret_value()}"} if token else {}
    try:
        return requests.request(method, url, json=body, headers=headers, timeout=ATTEMPT_SECONDS * 3)
    except requests.RequestException as error:
        raise UserError(f"{url} gives no answer ({type(error).__name__}). Check the address.") from None


# ---- The smoke test


def smoke_test(url: str, model: Model, golden: files.Golden | None, seconds: float) -> None:
    """Wait until the server at `url` says that it serves `model`, then ask it for the golden images.

    Raises UserError with what it last said, or with the answer that differs.
    """
    deadline, problem = time.monotonic() + seconds, "it was not asked"
    while True:
        problem = not_serving(url, model)
        if not problem:
            break
        if time.monotonic() >= deadline:
            raise UserError(f"{url} does not serve {model.tag} after {seconds:.0f} s: {problem}.")
        time.sleep(min(PAUSE, max(0.0, deadline - time.monotonic())))
    if golden is not None:
        check_golden(url, golden)


def not_serving(url: str, model: Model) -> str:
    """Why the server is not, or not yet, serving the model; "" when it is."""
    try:
        for path in ("/health", "/ready"):
            answer = requests.get(f"{url}{path}", timeout=ATTEMPT_SECONDS)
            if answer.status_code != 200:
                return f"{path} answers {answer.status_code}"
        answer = requests.get(
            f"{url}/get_experiments_metas", params={"live": "true"}, timeout=ATTEMPT_SECONDS
        )
        content = answer.json()
        if content["live"] != model.tag:
            return f"it serves {content['live']!r:.110}"
        found = [each for each in content["experiments"] if each["tag"] == model.tag]
        if model.sha256 and any(each["model_sha256"] != model.sha256 for each in found):
            return f"its {model.tag} is another model, sha256 {found[0]['model_sha256']!r:.80}"
        return ""
    except (requests.RequestException, ValueError, KeyError, TypeError) as error:
        return f"no answer that can be read ({type(error).__name__})"


def check_golden(url: str, golden: files.Golden) -> None:
    """Raises UserError when the server's probabilities of the golden images are not the ones of the bundle."""
    answer = request("POST", f"{url}/invocations", None, {"inputs": golden.images.tolist()})
    try:
        answer.raise_for_status()
        got = np.asarray(answer.json()["predictions"], np.float64)
    except (requests.RequestException, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{url}/invocations does not answer the golden images: {type(error).__name__}, {answer.text[:200]!r}."
        ) from None
    if got.shape != golden.probabilities.shape:
        raise UserError(
            f"{url}/invocations answers shape {got.shape}, expected {golden.probabilities.shape}."
        )
    off = float(np.abs(got - golden.probabilities).max())
    if not off <= TOLERANCE:  # NaN too
        raise UserError(f"{url} answers the golden images otherwise than the release: off by {off:.2g}.")


# ---- All of it


def run(settings: Settings, job: Deployed) -> None:
    """Deploy, test, record; on failure go back and raise UserError."""
    previous = live(settings, job) or job.previous
    try:
        print(deploy(settings, job.model))
        if settings.serve_url:
            golden = files.load_golden(job.folder / bundle.GOLDEN)
            smoke_test(settings.serve_url, job.model, golden, settings.deploy_timeout)
            print(f"{settings.serve_url} serves {job.model.tag} and answers the golden images as it should")
        else:
            print("SERVE_URL is not set: not tested")
    except UserError as error:
        raise UserError(f"{error}\n{roll_back(settings, previous)}") from None
    record(settings, job.model)


def live(settings: Settings, job: Deployed) -> Model | None:
    """What the server that is to swap serves now; None where something else deploys, or it does not say."""
    if settings.deploy_command or settings.deploy_webhook or settings.serve_url is None:
        return None
    try:
        answer = requests.get(f"{settings.serve_url}/get_experiments_metas", timeout=ATTEMPT_SECONDS)
        tag = bundle.check_tag(str(answer.json()["live"]))
    except (requests.RequestException, ValueError, KeyError, TypeError):
        return None
    return Model(tag) if tag != job.model.tag else None


def roll_back(settings: Settings, previous: Model | None) -> str:
    """Deploy what was there before; how that went."""
    if previous is None:
        return "There is no earlier release to go back to: what is deployed now is unknown. Look at it."
    if not previous.image and (settings.deploy_command or settings.deploy_webhook):
        return (
            f"{previous.tag} has no image on record, so nothing was rolled back. Run its deploy job again, "
            "or set PREVIOUS_IMAGE."
        )
    print(f"rolling back to {previous.tag} {previous.image}", file=sys.stderr)
    try:
        deploy(settings, previous)
        if settings.serve_url:
            smoke_test(settings.serve_url, previous, None, settings.deploy_timeout)
    except UserError as error:
        return f"Rolling back to {previous.tag} failed too: {error}\nWhat is deployed now is unknown. Look at it."
    return f"Rolled back to {previous.tag}{' ' + previous.image if previous.image else ''}."


def record(settings: Settings, model: Model) -> None:
    """Note the image in its GitLab release, for the next one to go back to. A refusal is said: the model runs already."""
    project = access.connect(settings)
    if project is None or not model.image:
        return
    try:
        with access.explained(project, f"Noting the image in the release of {model.tag}"):
            gitlab_release.link(
                project, model.tag, gitlab_release.IMAGE_LINK, f"https://{model.image}", "image"
            )
    except UserError as error:
        remedy = (
            "Where tags are protected, the job's own token writes releases for those only who may make such a tag: set "
            "RELEASE_TOKEN with the environment scope production, too (masked, protected). "
            if settings.release_token is None
            else ""
        )
        print(
            f"warning: {error} The next deployment will not go back to this image. {remedy}"
            "Then run the job again: deploying the same image twice does no harm.",
            file=sys.stderr,
        )


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ml.release.deploy", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--smoke-only", action="store_true", help="deploy nothing, test what SERVE_URL serves"
    )
    arguments = parser.parse_args(given)
    settings = load_settings()
    job = read_job(settings, dict(os.environ))
    if job is None:
        print("MODEL_TAG is not set: no model was released, nothing to deploy.")
        return
    if arguments.smoke_only:
        if settings.serve_url is None:
            raise UserError("--smoke-only needs SERVE_URL, the address of the server to look at.")
        golden = files.load_golden(job.folder / bundle.GOLDEN)
        smoke_test(settings.serve_url, job.model, golden, settings.deploy_timeout)
        print(f"{settings.serve_url} serves {job.model.tag} as it should")
        return
    if not (settings.deploy_command or settings.deploy_webhook or settings.serve_url):
        print("None of DEPLOY_COMMAND, DEPLOY_WEBHOOK and SERVE_URL is set: nothing was deployed.")
        return
    print(f"deploying {job.model.tag} {job.model.image}".strip())
    run(settings, job)


if __name__ == "__main__":
    exit_on_user_error(main)
