"""The expanded .gitlab-ci.yml, and an evaluation of its rules that is not gitlab-ci-local's, which skips `workflow`."""

import fnmatch
import json
import re
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from rehearse import gitlab, runner
from rehearse.project import ROOT

TOKEN = re.compile(
    r"""\s*(?: (?P<variable>\$\w+) | "(?P<double>[^"]*)" | '(?P<single>[^']*)' | /(?P<regex>(?:\\.|[^/])*)/
    | (?P<null>null) | (?P<operator>==|!=|=~|!~|&&|\|\||\(|\)) )""",
    re.VERBOSE,
)


def evaluate(expression: str, variables: dict[str, str]) -> bool:
    """GitLab's `rules:if`: comparisons, joined by && before ||, with parentheses. An unset variable is null."""
    tokens, at = [], 0
    while at < len(expression.rstrip()):
        match = TOKEN.match(expression, at)
        assert match, f"cannot read {expression!r} at {at}"
        tokens.append(next((kind, text) for kind, text in match.groupdict().items() if text is not None))
        at = match.end()

    def operand() -> Any:
        kind, text = tokens.pop(0)
        if (kind, text) == ("operator", "("):
            value = either()
            assert tokens.pop(0) == ("operator", ")")
            return value
        if kind == "variable":
            return variables.get(text[1:])
        return None if kind == "null" else re.compile(text) if kind == "regex" else text

    def comparison() -> bool:
        left = operand()
        if not tokens or tokens[0][1] not in ("==", "!=", "=~", "!~"):
            return bool(left)
        operator = tokens.pop(0)[1]
        right = operand()
        if operator in ("==", "!="):
            return bool((left == right) == (operator == "=="))
        return (left is not None and right.search(left) is not None) == (operator == "=~")

    def both() -> bool:
        values = [comparison()]
        while tokens and tokens[0][1] == "&&":
            tokens.pop(0)
            values.append(comparison())
        return all(values)

    def either() -> bool:
        values = [both()]
        while tokens and tokens[0][1] == "||":
            tokens.pop(0)
            values.append(both())
        return any(values)

    result = either()
    assert not tokens, f"{expression!r}: something is left"
    return result


def matching_rule(
    rules: list[dict[str, Any]], variables: dict[str, str], changed: set[str]
) -> dict[str, Any] | None:
    """The first that applies. `changes` holds where one of `changed` matches, and in a pipeline without a push."""
    for rule in rules:
        unknown = set(rule) - {"if", "when", "changes", "variables", "allow_failure"}
        assert not unknown, f"this evaluation does not know {unknown}"
        patterns = rule.get("changes", [])
        hit = not patterns or any(fnmatch.fnmatch(name, pattern) for name in changed for pattern in patterns)
        if hit and ("if" not in rule or evaluate(rule["if"], variables)):
            return rule
    return None


@dataclass(frozen=True)
class Expanded:
    """The YAML after includes, inputs and extends."""

    tree: dict[str, Any]

    @cached_property
    def jobs(self) -> dict[str, dict[str, Any]]:
        keywords = ("stages", "workflow", "variables", "default", "include")
        return {
            name: job
            for name, job in self.tree.items()
            if name not in keywords and not name.startswith(".") and isinstance(job, dict)
        }

    def pipeline(self, variables: dict[str, str], changed: set[str] | None = None) -> dict[str, str]:
        """The jobs of a pipeline with their `when`; none where `workflow` makes no pipeline. "" counts as unset."""
        known = {name: value for name, value in variables.items() if value}
        defaults = self.tree.get("variables", {})
        for name, value in defaults.items():
            known.setdefault(name, value["value"] if isinstance(value, dict) else str(value))
        workflow = matching_rule(self.tree["workflow"]["rules"], known, changed or set())
        if workflow is None or workflow.get("when") == "never":
            return {}
        known |= workflow.get("variables", {})
        jobs = {}
        for name, job in self.jobs.items():
            rule = matching_rule(job["rules"], known, changed or set())
            if rule is not None and rule.get("when", "on_success") != "never":
                jobs[name] = rule.get("when", "on_success")
        return jobs


def repository(folder: Path, source: Path = ROOT, names: tuple[str, ...] = ()) -> Path:
    """A git repository with the files `names` of `source`, with an origin, so that gitlab-ci-local accepts it."""
    names = names or (".gitlab-ci.yml", "templates/experiment/template.yml", "constraints.txt", "Dockerfile")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((source / name).read_bytes())
    commands = [
        ("init", "--quiet", "--initial-branch=main"),
        ("config", "user.name", "test"),
        ("config", "user.email", "test@example.com"),
        ("config", "commit.gpgsign", "false"),
        ("add", "--all"),
        ("commit", "--quiet", "--message", "files"),
        ("remote", "add", "origin", "http://127.0.0.1:1/g/proj.git"),
        ("update-ref", "refs/remotes/origin/main", "HEAD"),
        ("symbolic-ref", "refs/remotes/origin/HEAD", "refs/remotes/origin/main"),
    ]
    for command in commands:
        subprocess.run(["git", *command], cwd=folder, check=True, capture_output=True)
    return folder


def ask(folder: Path, variables: dict[str, str], *arguments: str) -> str:
    """What gitlab-ci-local prints for `--list-json` or `--preview`."""
    secrets = gitlab.write_variables(folder / ".gitlab-ci-local" / "none.json", [], protected_ref=False)
    command = runner.command(folder, variables, secrets, *arguments)
    done = subprocess.run(command, cwd=folder, env=runner.environment({}), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def expand(folder: Path, variables: dict[str, str] | None = None) -> Expanded:
    """Also checks the expanded YAML against GitLab's schema, as gitlab-ci-local does by itself."""
    return Expanded(YAML(typ="safe").load(ask(folder, variables or gitlab.branch(), "--preview")))


def listed(folder: Path, variables: dict[str, str]) -> dict[str, str]:
    """The jobs that gitlab-ci-local would run, with their `when`."""
    jobs = json.loads(ask(folder, variables, "--list-json", "--no-json-schema-validation"))
    return {job["name"]: job["when"] for job in jobs if job["when"] != "never"}
