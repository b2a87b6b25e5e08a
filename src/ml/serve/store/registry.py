"""An MLflow registry, asked by REST: serving needs no mlflow. Each version carries the bundle's files below bundle/."""

import hashlib
import io
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit, urlunsplit

import requests

from ml.bundle import EXPERIMENT, EXPERIMENT_LIMIT, GOLDEN, MODEL, Experiment, parse_experiment
from ml.errors import UserError
from ml.serve.model import GOLDEN_LIMIT, Refused
from ml.serve.settings import ServeSettings
from ml.serve.store.base import Listing, NotFound, Unavailable

SECONDS = (5, 30)  # to connect, and between two pieces of an answer
ANSWER_LIMIT = 2**24  # bytes of one answer of the API
CHAMPION = "champion"
PAGE, PAGES = 200, 50
WHOLE = 300.0  # seconds of one answer or file in all
MALFORMED = (KeyError, TypeError, ValueError, AttributeError)  # what an answer of another shape raises here


class RegistryStore:
    """The registered model NAME of the server at `address`: http(s)://HOST[:PORT][/PREFIX][?model=NAME]."""

    def __init__(self, address: str, settings: ServeSettings) -> None:
        parts = urlsplit(address)
        self.name = parse_qs(parts.query).get("model", [settings.mlflow_model_name])[0]
        self.base = urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", ""))
        self.shown = f"{parts.hostname}{parts.path.rstrip('/')}"  # without a password
        self.session = requests.Session()
        self.session.trust_env = True
        if settings.mlflow_tracking_token is not None:
            token = settings.mlflow_tracking_token.get_secret_value()
            self.session.headers["Authorization"] = f"Bearer {token}"
        elif settings.mlflow_tracking_username is not None:
            password = settings.mlflow_tracking_password
            self.session.auth = (
                settings.mlflow_tracking_username,
                password.get_secret_value() if password else "",
            )
        self.seen: dict[str, Experiment] = {}  # by version

    def listing(self) -> Listing:
        with self.understood():
            experiments: dict[str, Experiment] = {}
            unreadable: dict[str, str] = {}
            versions = self.versions(f"name='{self.name}'")
            for version in sorted(versions, key=version_number):  # of several with one tag, the last
                name = tags_of(version).get("model_tag") or f"version {version['version']}"
                try:
                    experiment = self.experiment(version)
                    experiments[experiment.tag] = experiment
                except (Refused, NotFound) as error:
                    unreadable[name] = str(error)
            aliases: dict[str, list[str]] = {}
            by_version = {str(each["version"]): each for each in versions}
            for alias, number in sorted(self.aliases().items()):
                tag = tags_of(by_version.get(number, {})).get("model_tag")
                if tag:
                    aliases.setdefault(tag, []).append(alias)
            return Listing(list(experiments.values()), unreadable, aliases)

    def fetch(self, tag: str, folder: Path, limit: int) -> str:
        with self.understood():
            version = self.find(tag)
            experiment = self.experiment(version)
            (folder / EXPERIMENT).write_bytes(self.artifact(version, EXPERIMENT, EXPERIMENT_LIMIT))
            for name, most in ((MODEL, limit), (GOLDEN, GOLDEN_LIMIT)):
                with open(folder / name, "xb") as file:
                    self.download(version, name, most, file)
            return experiment.tag

    def newest(self) -> str:
        with self.understood():
            version = self.find(CHAMPION)
            return self.experiment(version).tag

    @contextmanager
    def understood(self) -> Iterator[None]:
        try:
            yield
        except MALFORMED as error:
            raise Unavailable(
                f"MLflow at {self.shown} gave an answer of another shape ({type(error).__name__})."
            ) from None

    def find(self, tag: str) -> dict[str, Any]:
        """The version with this model tag, else with this alias. Raises NotFound."""
        found = self.versions(f"name='{self.name}' and tags.model_tag='{tag}'")
        found = [each for each in found if tags_of(each).get("model_tag") == tag]
        if found:
            return max(found, key=version_number)
        number = self.aliases().get(tag)
        if number is not None:
            return self.ask("model-versions/get", name=self.name, version=number)["model_version"]  # type: ignore[no-any-return]
        raise NotFound(f"The registered model {self.name} has no version with the tag or alias {tag}.")

    def versions(self, condition: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        token = ""
        for _ in range(PAGES):
            more = {"page_token": token} if token else {}
            page = self.ask("model-versions/search", filter=condition, max_results=PAGE, **more)
            found += [each for each in page.get("model_versions", []) if each.get("name") == self.name]
            token = page.get("next_page_token", "")
            if not token:
                break
        return found

    def aliases(self) -> dict[str, str]:
        """Alias → version."""
        model = self.ask("registered-models/get", name=self.name).get("registered_model", {})
        return {each["alias"]: str(each["version"]) for each in model.get("aliases", [])}

    def experiment(self, version: dict[str, Any]) -> Experiment:
        number = str(version["version"])
        if number not in self.seen:
            content = self.artifact(version, EXPERIMENT, EXPERIMENT_LIMIT)
            tags = tags_of(version)
            wanted = tags.get("experiment_sha256")
            if wanted and hashlib.sha256(content).hexdigest() != wanted:
                raise Refused(
                    "sha256", f"{EXPERIMENT} of version {number} is not the one that was registered."
                )
            try:
                experiment = parse_experiment(content, EXPERIMENT)
            except UserError as error:
                raise Refused("files", str(error)) from None
            for name, found in (("model_sha256", experiment.model.sha256), ("model_tag", experiment.tag)):
                if tags.get(name, found) != found:
                    raise Refused(
                        "sha256", f"version {number} has {name} {tags[name]}, its {EXPERIMENT} {found}."
                    )
            self.seen[number] = experiment
        return self.seen[number]

    def artifact(self, version: dict[str, Any], name: str, limit: int) -> bytes:
        file = io.BytesIO()
        self.download(version, name, limit, file)
        return file.getvalue()

    def download(self, version: dict[str, Any], name: str, limit: int, file: Any) -> None:
        uri = self.ask("model-versions/get-download-uri", name=self.name, version=version["version"])[
            "artifact_uri"
        ]
        parts = urlsplit(uri)
        if parts.scheme == "mlflow-artifacts":
            path = quote(f"{parts.path.strip('/')}/bundle/{name}")
            response = self.get(f"{self.base}/api/2.0/mlflow-artifacts/artifacts/{path}", stream=True)
        else:  # the server fetches it from its own store
            query = {"name": self.name, "version": version["version"], "path": f"bundle/{name}"}
            response = self.get(f"{self.base}/model-versions/get-artifact", params=query, stream=True)
        with response:
            if response.status_code != 200:
                raise Refused(
                    "files", f"version {version['version']} has no bundle/{name} ({response.status_code})."
                )
            copy_limited(response, file, limit, name)

    def ask(self, route: str, **query: Any) -> dict[str, Any]:
        file = io.BytesIO()
        response = self.get(f"{self.base}/api/2.0/mlflow/{route}", params=query, stream=True)
        with response:
            if response.status_code == 404 and route in ("registered-models/get", "model-versions/get"):
                raise NotFound(f"There is no registered model {self.name} at {self.shown}.")
            if response.status_code != 200:
                raise Unavailable(f"MLflow at {self.shown} answered {response.status_code} to {route}.")
            copy_limited(response, file, ANSWER_LIMIT, route)
        try:
            answer = json.loads(file.getvalue() or b"{}")
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise Unavailable(f"MLflow at {self.shown} gave no JSON object to {route}.")
        return answer

    def get(self, url: str, **options: Any) -> requests.Response:
        try:
            return self.session.get(url, timeout=SECONDS, allow_redirects=False, **options)
        except requests.RequestException as error:
            raise Unavailable(f"MLflow at {self.shown} does not answer ({type(error).__name__}).") from None


def copy_limited(response: requests.Response, file: Any, limit: int, name: str) -> None:
    size, deadline = 0, time.monotonic() + WHOLE
    try:
        for piece in response.iter_content(2**16):
            size += len(piece)
            if time.monotonic() > deadline:
                raise Unavailable(f"{name} did not arrive within {WHOLE:.0f} s.")
            if size > limit:
                raise Refused("size", f"{name} has more than {limit:,} bytes.")
            file.write(piece)
    except requests.RequestException as error:
        raise Unavailable(f"the download of {name} broke off ({type(error).__name__}).") from None


def tags_of(version: dict[str, Any]) -> dict[str, str]:
    return {each["key"]: each["value"] for each in version.get("tags", [])}


def version_number(version: dict[str, Any]) -> tuple[int, ...]:
    return tuple(int(part) for part in str(version["version"]).split(".") if part.isdigit())
