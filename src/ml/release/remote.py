"""Configure the DVC remote of this job from the environment: DVC_REMOTE_URL and what its kind needs beside it.

    python -m ml.release.remote [--merge-request IID]

Only .dvc/config.local is written. A merge request writes to a remote of its own, `merge-request`, and reads `main`.
docs/remotes.md has the variables of each kind.
"""

import argparse
import importlib.util
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from configobj import ConfigObj, ConfigObjError
from dvc.config import Config, ConfigError

from ml import git
from ml.errors import UserError, exit_on_user_error
from ml.remotes import MAIN, MERGE_REQUEST
from ml.settings import Settings, load_settings

CONFIG = Path(".dvc/config.local")
COMMITTED = Path(".dvc/config")


@dataclass(frozen=True)
class Kind:
    """What one kind of remote needs: the package behind it, and the variables of which one set has to be there."""

    example: str
    package: str | None = None  # the module that DVC needs
    extra: str | None = None  # of this project
    credentials: tuple[
        tuple[str, ...], ...
    ] = ()  # any one of these sets; empty: none that could be told from here


KINDS = {
    "local": Kind("/srv/dvc"),
    "s3": Kind(
        "s3://bucket/path",
        "dvc_s3",
        "s3",
        (
            ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
            ("AWS_PROFILE",),
            ("AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE"),
            ("AWS_CONTAINER_CREDENTIALS_FULL_URI",),
            ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",),
        ),
    ),
    "gs": Kind("gs://bucket/path", "dvc_gs", "gs", (("GOOGLE_APPLICATION_CREDENTIALS",),)),
    "azure": Kind(
        "azure://container/path",
        "dvc_azure",
        "azure",
        (
            ("AZURE_STORAGE_CONNECTION_STRING",),
            ("AZURE_STORAGE_ACCOUNT", "AZURE_STORAGE_KEY"),
            ("AZURE_STORAGE_ACCOUNT", "AZURE_STORAGE_SAS_TOKEN"),
            ("AZURE_STORAGE_ACCOUNT", "AZURE_CLIENT_ID", "AZURE_CLIENT_SECRET", "AZURE_TENANT_ID"),
            ("AZURE_STORAGE_ACCOUNT", "AZURE_FEDERATED_TOKEN_FILE"),
        ),
    ),
    "gdrive": Kind(
        "gdrive://FOLDER_ID/path",
        "dvc_gdrive",
        "gdrive",
        (("GDRIVE_SERVICE_ACCOUNT_FILE",), ("GDRIVE_CREDENTIALS_DATA",)),
    ),
    "ssh": Kind(
        "ssh://user@host/absolute/path",
        "dvc_ssh",
        "ssh",
        (("DVC_REMOTE_KEY_FILE",), ("DVC_REMOTE_PASSWORD",), ("SSH_AUTH_SOCK",)),
    ),
    "webdav": Kind("webdav://host/path", "dvc_webdav", "webdav"),
    "webdavs": Kind("webdavs://host/path", "dvc_webdav", "webdav"),
    "http": Kind("http://host/path", "dvc_http"),
    "https": Kind("https://host/path", "dvc_http"),
}


def kind_of(url: str, variable: str = "DVC_REMOTE_URL") -> str:
    """
    Raises:
        UserError: the URL is none, or holds what belongs elsewhere. The message never repeats a password.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # its message would repeat what may be a password
        raise UserError(f"{variable} is not a URL: its host or port makes no sense.") from None
    if parts.scheme in ("", "file"):
        if parts.netloc or not parts.path.startswith("/"):
            raise UserError(
                f"{variable} has neither `://` nor a leading `/`: a folder has to be an absolute path, such as {KINDS['local'].example}; "
                f"other kinds begin with {', '.join(f'{kind}://' for kind in KINDS if kind != 'local')}."
            )
        return "local"
    kind = KINDS.get(parts.scheme)
    if kind is None or parts.scheme == "local":
        raise UserError(
            f"{variable} begins with {parts.scheme}://, which is no remote that DVC knows. "
            f"Use one of {', '.join(each.example for each in KINDS.values())}."
        )
    if parts.password is not None:
        raise UserError(
            f"{variable} holds a password, and DVC prints URLs. Put it into DVC_REMOTE_PASSWORD (masked)."
        )
    problem = None
    if not parts.hostname:
        problem = "has no host, bucket, container or folder"
    elif parts.query or parts.fragment:
        problem = "has a query or a fragment"
    elif " " in url:
        problem = "has a blank in it"
    elif ".." in parts.path.split("/"):
        problem = "has `..` in its path"
    elif parts.scheme == "ssh" and parts.path in ("", "/"):
        problem = "has no path"
    elif parts.username and parts.scheme not in ("ssh", "webdav", "webdavs"):
        problem = "has a user in it: put it into DVC_REMOTE_USER"
    elif port == 0:
        problem = "has port 0"
    if problem:
        raise UserError(f"{variable} {problem}. Expected something like {kind.example}.")
    return parts.scheme


def local_path(url: str) -> str:
    return os.path.normpath(urlsplit(url).path if url.startswith("file:") else url)


def check_installed(kind: str) -> None:
    package, extra = KINDS[kind].package, KINDS[kind].extra
    if package and importlib.util.find_spec(package) is None:
        name = package.replace("_", "-")
        raise UserError(
            f"DVC_REMOTE_URL is a {kind} remote, and the package {name} is missing. "
            f"Run `pip install -c constraints.txt '.[{extra or 'report'}]'` (or `pip install {name}`)."
        )
    proxy = next((name for name in ("https_proxy", "HTTPS_PROXY") if os.environ.get(name)), None)
    if kind == "gdrive" and proxy and importlib.util.find_spec("socks") is None:
        raise UserError(
            f"{proxy} is set, and without the package PySocks Google Drive's client goes past a proxy, with no word of it. "
            "Run `pip install -c constraints.txt '.[gdrive]'` (or `pip install PySocks`)."
        )


def missing_credentials(kind: str) -> str | None:
    """The variables that would have to be set, in words; None where enough of them are, or none is needed."""
    sets = KINDS[kind].credentials
    if not sets or any(all(os.environ.get(name) for name in names) for names in sets):
        return None
    # the set that is nearest to complete comes first: its missing variable is most likely the forgotten one
    nearest = max(sets, key=lambda names: sum(bool(os.environ.get(name)) for name in names) / len(names))
    absent = [name for name in nearest if not os.environ.get(name)]
    if len(absent) < len(nearest):
        return " and ".join(absent)
    return ", or ".join(" and ".join(names) for names in sets)


def options(kind: str, settings: Settings) -> dict[str, str]:
    """DVC's options of one remote.

    Raises:
        UserError: a file that a variable names is missing, or two variables do not fit.
    """
    found = {"verify": "true"}  # what is downloaded is hashed before it is used
    user, password, token = settings.dvc_remote_user, settings.dvc_remote_password, settings.dvc_remote_token
    if kind in ("s3", "gs") and settings.dvc_remote_endpoint_url:
        found["endpointurl"] = settings.dvc_remote_endpoint_url
    if kind == "gs" and (credentials := os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")):
        found["credentialpath"] = str(readable(Path(credentials), "GOOGLE_APPLICATION_CREDENTIALS"))
    if kind == "gdrive":
        found["gdrive_use_service_account"] = "true"
        # a Content manager of a Shared Drive may delete nothing for good
        found["gdrive_trash_only"] = "true"
        if settings.gdrive_credentials_data:  # dvc-gdrive prefers it
            check_key(settings.gdrive_credentials_data.get_secret_value(), "GDRIVE_CREDENTIALS_DATA")
        elif settings.gdrive_service_account_file:
            path = readable(settings.gdrive_service_account_file, "GDRIVE_SERVICE_ACCOUNT_FILE")
            check_key(path.read_text(errors="replace"), "GDRIVE_SERVICE_ACCOUNT_FILE")
            found["gdrive_service_account_json_file_path"] = str(path)
        else:
            raise UserError(
                f"DVC_REMOTE_URL is a gdrive remote. Not set: {missing_credentials(kind)}. Set one under Settings → CI/CD → "
                "Variables (docs/remotes.md says how to get it)."
            )
    if kind == "ssh":
        if settings.dvc_remote_key_file:
            found["keyfile"] = str(readable(settings.dvc_remote_key_file, "DVC_REMOTE_KEY_FILE"))
        if settings.dvc_remote_known_hosts_file:
            readable(settings.dvc_remote_known_hosts_file, "DVC_REMOTE_KNOWN_HOSTS_FILE")
        if password:
            found["passphrase" if "keyfile" in found else "password"] = password.get_secret_value()
        found["timeout"] = "60"  # seconds to connect; DVC's own are 1800
    if kind in ("ssh", "webdav", "webdavs") and user:
        found["user"] = user
    if kind in ("webdav", "webdavs"):
        if token:
            found["token"] = token.get_secret_value()
        elif password:
            found["password"] = password.get_secret_value()
    if kind in ("http", "https"):
        found["method"] = settings.dvc_remote_http_method
        if token:
            found |= {
                "auth": "custom",
                "custom_auth_header": "Authorization",
                "password": f"Bearer {token.get_secret_value()}",
            }
        elif user and password:
            found |= {"auth": "basic", "user": user, "password": password.get_secret_value()}
        elif user or password:
            raise UserError(
                "Of DVC_REMOTE_USER and DVC_REMOTE_PASSWORD one is missing: HTTP needs both, or DVC_REMOTE_TOKEN."
            )
    return found


def check_key(text: str, variable: str) -> None:
    """Raises UserError: it is not what Google Cloud gives as a service account's key. The message repeats nothing of it."""
    try:
        key = json.loads(text)
    except ValueError:
        key = None
    names = ("client_email", "client_id", "private_key", "private_key_id")
    absent = [name for name in names if not key.get(name)] if isinstance(key, dict) else []
    if not isinstance(key, dict):
        problem = "is no JSON object"
    elif key.get("type") != "service_account":
        problem = "is not of type service_account"
    elif absent:
        problem = f"has no {', '.join(absent)}"
    else:
        return
    raise UserError(
        f"{variable} {problem}. It has to be the JSON key of a service account, as Google Cloud offers it for download "
        "under IAM → Service accounts → Keys."
    )


def readable(path: Path, variable: str) -> Path:
    if not path.is_file() or not os.access(path, os.R_OK):
        raise UserError(
            f"{variable} names no file that can be read. In GitLab, make it a variable of type *File*."
        )
    return path.resolve()


def configure(settings: Settings, merge_request: int | None = None) -> list[str]:
    """Write .dvc/config.local from the environment; the names of the remotes that it has now.

    Args:
        merge_request: whose prefix to configure too; the one of this pipeline when it is None.

    Raises:
        UserError: a variable is missing or makes no sense, or a package is missing.
    """
    if not Path(".dvc").is_dir():
        raise UserError("There is no .dvc folder here. Run from the root of the repository.")
    check_committed()
    iid = merge_request or settings.ci_merge_request_iid
    url = settings.dvc_remote_url
    if url is None:
        hint = " (a fork's pipeline never sees it, and need not)" if settings.from_fork else ""
        raise UserError(
            f"DVC_REMOTE_URL is not set{hint}. Set it under Settings → CI/CD → Variables, such as s3://bucket/path; "
            "docs/remotes.md has every kind."
        )
    sections = {MAIN: section(url, "DVC_REMOTE_URL", settings)}
    if iid is not None:
        given = settings.dvc_merge_request_remote_url
        base = given or f"{url.rstrip('/')}/merge-requests"
        name = "DVC_MERGE_REQUEST_REMOTE_URL" if given else "DVC_REMOTE_URL"
        sections[MERGE_REQUEST] = section(f"{base.rstrip('/')}/{iid}", name, settings)
    write_config(sections)
    return list(sections)


def check_committed() -> None:
    """Raises UserError where .dvc/config, which a merge request can change, has options of the remotes made here.

    DVC would add them to those of config.local. Some run a command (`configpath`, by its credential_process) or send
    credentials elsewhere (`endpointurl`), in the jobs that judge and release as well.
    """
    if git.attempt("ls-files", "--error-unmatch", "--", str(CONFIG)).returncode == 0:
        raise UserError(f"{CONFIG} is committed, and this command writes it. Run `git rm --cached {CONFIG}`.")
    try:
        committed = Config.load_file(str(COMMITTED)) if COMMITTED.is_file() else {}
    except ConfigError as error:
        raise UserError(f"{COMMITTED} cannot be read: {error}. Mend it.") from None
    remotes = committed.get("remote", {})
    found = [name for name in (MAIN, MERGE_REQUEST) if name in remotes]
    if found:
        told = "; ".join(f"{name} has {', '.join(sorted(remotes[name])) or 'no option'}" for name in found)
        raise UserError(
            f"{COMMITTED} defines a remote that this command makes from variables alone ({told}). Give it another name "
            "there, or remove it."
        )


def section(url: str, variable: str, settings: Settings) -> dict[str, str]:
    kind = kind_of(url, variable)
    check_installed(kind)
    return {"url": local_path(url) if kind == "local" else url.rstrip("/"), **options(kind, settings)}


def write_config(sections: dict[str, dict[str, str]]) -> None:
    """Replace these remotes in .dvc/config.local and make `main` the default; other settings there stay."""
    try:
        config = ConfigObj(str(CONFIG), encoding="utf-8") if CONFIG.exists() else ConfigObj(encoding="utf-8")
    except (ConfigObjError, UnicodeDecodeError):
        config = ConfigObj(encoding="utf-8")  # torn: written anew
    for name in (MAIN, MERGE_REQUEST):
        config.pop(f'remote "{name}"', None)
    for name, values in sections.items():
        config[f'remote "{name}"'] = values
    config.setdefault("core", {})["remote"] = MAIN
    temporary = CONFIG.with_name(f".{CONFIG.name}.{os.getpid()}.tmp")
    try:
        # it may hold a password, so it is nobody else's from its first byte on
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            config.write(file)
        os.replace(temporary, CONFIG)
    except OSError as error:
        raise UserError(f"{CONFIG} could not be written: {error.strerror}.") from None
    except ConfigObjError:
        raise UserError(
            "DVC_REMOTE_PASSWORD or DVC_REMOTE_TOKEN cannot be written into DVC's configuration: "
            "it has a line break, or quotes of both kinds. Choose another."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_name(settings: Settings) -> str:
    """The remote that this job writes to: a merge request's own, else `main`."""
    return MERGE_REQUEST if settings.ci_merge_request_iid else MAIN


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ml.release.remote", description="Configure the DVC remote of this job."
    )
    parser.add_argument("--merge-request", type=int, metavar="IID", help="make its prefix readable too")
    arguments = parser.parse_args()
    settings = load_settings()
    names = configure(settings, arguments.merge_request)
    print(
        f"{CONFIG} has the remotes {', '.join(names)}; this job writes to {write_name(settings)}.",
        file=sys.stderr,
    )


if __name__ == "__main__":
    exit_on_user_error(main)
