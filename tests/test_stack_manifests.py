"""compose.yaml, kustomize and the servers' own checks: what can be told without a container engine or a cluster."""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.stack import DEPLOY

OVERLAYS = ("team", "cloud")
OWN_IMAGE = "mlflow-stack"


@pytest.fixture(scope="module")
def deploy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of deploy/ with secrets made."""
    copy = tmp_path_factory.mktemp("project") / "deploy"
    shutil.copytree(DEPLOY, copy, ignore=shutil.ignore_patterns("secrets", "backup", ".env"))
    make_secrets(copy / "secrets")
    return copy


def make_secrets(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(DEPLOY / "make_secrets.py"),
        "--mlflow-host",
        "m.test",
        "--s3-host",
        "s.test",
    ]
    return subprocess.run([*command, "--to", str(folder), *more], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return YAML(typ="safe").load((DEPLOY / "compose.yaml").read_text())  # type: ignore[no-any-return]


def template_variables() -> set[str]:
    return set(re.findall(r"\$\{([A-Z0-9_]+)\}", (DEPLOY / "proxy" / "stack.conf.template").read_text())) - {
        "CAPITALS"
    }


def server_variables() -> set[str]:
    """What server.py refuses to start without."""
    answer = start_server({"PATH": os.environ["PATH"]})
    return set(re.findall(r"(?m)^  ([A-Z0-9_]+):", answer.stderr))


def start_server(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DEPLOY / "tracking" / "server.py"), "serve"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_compose_file_follows_the_compose_specification() -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*check, str(DEPLOY / "compose.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_compose_gives_every_container_limits_and_as_few_rights_as_can_be(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        limits = service["deploy"]["resources"]["limits"]
        assert {"cpus", "memory", "pids"} <= limits.keys(), name
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        image = service["image"]
        assert OWN_IMAGE in image or re.search(r":[\w.-]+@sha256:[0-9a-f]{64}$", image), name
    published = [name for name, service in compose["services"].items() if service.get("ports")]
    assert published == ["proxy"]
    for name in ("proxy", "mlflow-1", "mlflow-2", "postgres"):
        assert compose["services"][name]["healthcheck"]["test"], name


def test_compose_has_no_default_for_names_and_secrets(compose: dict[str, Any], deploy: Path) -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    for name in ("MLFLOW_HOST", "S3_HOST"):
        assert f"${{{name}:?" in text
    files = {Path(secret["file"]).name for secret in compose["secrets"].values()}
    assert files <= {path.name for path in (deploy / "secrets").iterdir()}
    used = {name for service in compose["services"].values() for name in service.get("secrets", [])}
    assert used == compose["secrets"].keys()
    assert not re.search(r"(?i)password: *[^/\s{]", text)


def test_compose_gives_servers_and_proxy_what_they_read(compose: dict[str, Any]) -> None:
    for name in ("mlflow-1", "mlflow-2", "prepare"):
        given = compose["services"][name]["environment"]
        assert server_variables() <= given.keys(), name
        paths = {Path(value).name for value in given.values() if str(value).startswith("/run/secrets/")}
        assert paths == set(compose["services"][name]["secrets"])
    assert template_variables() <= compose["services"]["proxy"]["environment"].keys()
    addresses = {
        each["networks"]["stack"]["ipv4_address"]
        for name, each in compose["services"].items()
        if name[:7] == "mlflow-"
    }
    assert (
        set(re.findall(r"[\d.]{8,}(?=:5000)", compose["services"]["proxy"]["environment"]["MLFLOW_SERVERS"]))
        == addresses
    )


def test_server_refuses_to_start_and_names_all_that_is_missing(tmp_path: Path) -> None:
    assert server_variables() >= {
        "PUBLIC_HOST",
        "DB_HOST",
        "S3_BUCKET",
        "ADMIN_PASSWORD_FILE",
        "SESSION_KEY_FILE",
    }
    short = tmp_path / "password"
    short.write_text("admin\n")
    answer = start_server(
        {"PATH": os.environ["PATH"], "ADMIN_PASSWORD_FILE": str(short), "DB_PASSWORD_FILE": "/nowhere"}
    )
    assert answer.returncode == 1 and "fewer than 12 characters" in answer.stderr
    assert "/nowhere cannot be read" in answer.stderr and "Traceback" not in answer.stderr


def test_secrets_are_random_kept_and_closed_to_others(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    output = make_secrets(one).stdout
    make_secrets(two)
    before = {path.name: path.read_bytes() for path in one.iterdir()}
    for name, content in before.items():
        if name != "kustomization.yaml":
            assert content != (two / name).read_bytes(), name
        assert content.decode().strip() not in output
    assert stat.S_IMODE(one.stat().st_mode) == 0o700
    make_secrets(one)
    assert {path.name: path.read_bytes() for path in one.iterdir()} == before
    make_secrets(one, "--renew-certificates")
    changed = {path.name for path in one.iterdir() if path.read_bytes() != before[path.name]}
    assert changed == {"tls.crt", "tls.key", "postgres.crt", "postgres.key"}
    verify = [
        "openssl",
        "verify",
        "-CAfile",
        str(one / "ca.crt"),
        "-verify_hostname",
        "s.test",
        str(one / "tls.crt"),
    ]
    assert subprocess.run(verify, capture_output=True).returncode == 0


def test_secrets_are_not_in_git() -> None:
    paths = ["deploy/secrets/admin-password", "deploy/.env", "deploy/backup/x"]
    done = subprocess.run(["git", "check-ignore", *paths], cwd=DEPLOY.parent, capture_output=True, text=True)
    assert done.stdout.split() == paths


def build(overlay: Path) -> subprocess.CompletedProcess[str]:
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is missing")
    return subprocess.run(["kubectl", "kustomize", str(overlay)], capture_output=True, text=True)


def built(deploy: Path, overlay: str) -> list[dict[str, Any]]:
    done = build(deploy / "kustomize" / "tracking" / "overlays" / overlay)
    assert done.returncode == 0, done.stderr
    return list(YAML(typ="safe").load_all(done.stdout))


def test_kustomize_refuses_to_build_without_secrets(tmp_path: Path) -> None:
    shutil.copytree(DEPLOY, tmp_path / "deploy", ignore=shutil.ignore_patterns("secrets"))
    done = build(tmp_path / "deploy" / "kustomize" / "tracking" / "overlays" / "team")
    assert done.returncode != 0 and "secrets" in done.stderr


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_overlay_names_only_what_it_has(deploy: Path, overlay: str) -> None:
    objects = built(deploy, overlay)
    names = {(each["kind"], each["metadata"]["name"]) for each in objects}
    data = {(each["kind"], each["metadata"]["name"]): each.get("data", {}) for each in objects}
    for pod in pods(objects):
        for container in pod.get("initContainers", []) + pod["containers"]:
            given = {each["name"] for each in container.get("env", [])}
            for source in container.get("envFrom", []):
                key = ("ConfigMap", source["configMapRef"]["name"])
                assert key in names
                given |= data[key].keys()
            if container["args"][:1] == ["/opt/stack/server.py"] if "args" in container else False:
                assert server_variables() <= given
            if container["name"] == "nginx":
                assert template_variables() <= given
            mounted = {each["name"] for each in container["volumeMounts"]}
            assert mounted <= {volume["name"] for volume in pod["volumes"]} | {"database", "data"}
        for volume in pod["volumes"]:
            if "secret" in volume:
                assert ("Secret", volume["secret"]["secretName"]) in names
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in names


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_pods_have_limits_and_as_few_rights_as_can_be(deploy: Path, overlay: str) -> None:
    objects = built(deploy, overlay)
    assert {each["kind"] for each in objects} >= {
        "NetworkPolicy",
        "PodDisruptionBudget",
        "HorizontalPodAutoscaler",
    }
    assert [
        each["metadata"]["name"] for each in objects if each.get("spec", {}).get("type") == "LoadBalancer"
    ] == ["proxy"]
    for pod in pods(objects):
        assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
        for container in pod.get("initContainers", []) + pod["containers"]:
            assert container["resources"]["limits"].keys() == {"cpu", "memory"}
            rights = container["securityContext"]
            assert rights["readOnlyRootFilesystem"] and rights["capabilities"] == {"drop": ["ALL"]}
            assert OWN_IMAGE in container["image"] or "@sha256:" in container["image"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_objects_follow_the_schemas_of_kubernetes(deploy: Path, overlay: str) -> None:
    schemas = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    objects = built(deploy, overlay)
    assert all(schemas.validate(each, "1.32", strict=True) for each in objects)
    objects[0]["metadata"]["nmae"] = "a slip"
    with pytest.raises(schemas.ValidationError, match="nmae"):
        schemas.validate(objects[0], "1.32", strict=True)


def pods(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for each in objects:
        spec = each.get("spec", {})
        spec = spec.get("jobTemplate", {}).get("spec", spec)
        if "template" in spec:
            found.append(spec["template"]["spec"])
    assert found
    return found
