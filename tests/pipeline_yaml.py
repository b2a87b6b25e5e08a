"""The expanded .gitlab-ci.yml, and an evaluation of its rules that is not gitlab-ci-local's, which skips `workflow`."""

import fnmatch
import json
import re
import subprocess
from collections.abc import Collection
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
        unknown = set(rule) - {"if", "when", "changes", "variables", "allow_failure", "auto_cancel"}
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

    def known(self, variables: dict[str, str], changed: set[str] | None = None) -> dict[str, str] | None:
        """The variables of a pipeline, `workflow`'s among them; None where it makes none. "" counts as unset."""
        defaults = self.tree.get("variables", {})
        known = {
            name: value["value"] if isinstance(value, dict) else str(value)
            for name, value in defaults.items()
        }
        known |= {name: value for name, value in variables.items() if value}
        workflow = matching_rule(self.tree["workflow"]["rules"], known, changed or set())
        if workflow is None or workflow.get("when") == "never":
            return None
        return known | workflow.get("variables", {})

    def rules(self, variables: dict[str, str], changed: set[str] | None = None) -> dict[str, dict[str, Any]]:
        """The rule by which each job is in a pipeline; none where `workflow` makes no pipeline."""
        known = self.known(variables, changed)
        if known is None:
            return {}
        rules = {
            name: matching_rule(job["rules"], known, changed or set()) for name, job in self.jobs.items()
        }
        return {
            name: rule for name, rule in rules.items() if rule is not None and rule.get("when") != "never"
        }

    def pipeline(self, variables: dict[str, str], changed: set[str] | None = None) -> dict[str, str]:
        """The jobs of a pipeline with their `when`; none where `workflow` makes no pipeline."""
        return {name: rule.get("when", "on_success") for name, rule in self.rules(variables, changed).items()}

    def resolve(self, job: str, text: str, variables: dict[str, str], changed: set[str] | None = None) -> str:
        """`text` with what GitLab and the runner put in for its variables: `variables` before the file's own."""
        known = self.known(variables, changed)
        assert known is not None
        rule = self.rules(variables, changed)[job]
        given = {name: value for name, value in variables.items() if value}
        known |= self.jobs[job].get("variables", {}) | rule.get("variables", {}) | given
        for _ in range(5):  # values name other variables
            text = re.sub(r"\$(\w+)", lambda match: known.get(match[1], ""), text)
        return text

    def image(self, job: str, variables: dict[str, str], changed: set[str] | None = None) -> str:
        return self.resolve(job, self.jobs[job]["image"]["name"], variables, changed)

    def needs(self, job: str) -> list[dict[str, Any]]:
        return self.jobs[job]["needs"]

    def lost(self, variables: dict[str, str], changed: set[str] | None = None) -> set[str]:
        """The jobs that a newer commit on the same ref may stop, and those that then do not start.

        By workflow:rules:auto_cancel, else workflow:auto_cancel, else `conservative` (doc/ci/yaml/_index.md,
        Ci::PipelineCreation::CancelRedundantPipelinesService): `none` stops nothing, `interruptible` the jobs that are,
        `conservative` all before the first that is not has started.
        """
        known = self.known(variables, changed)
        if known is None:
            return set()
        workflow = self.tree["workflow"]
        rule = matching_rule(workflow["rules"], known, changed or set()) or {}
        mode = (workflow.get("auto_cancel", {}) | rule.get("auto_cancel", {})).get(
            "on_new_commit", "conservative"
        )
        jobs = self.pipeline(variables, changed)
        if mode == "none":
            return set()
        lost = {name for name in jobs if mode == "conservative" or self.jobs[name].get("interruptible")}
        while more := {
            name for name in set(jobs) - lost if lost & {need["job"] for need in self.needs(name)}
        }:
            lost |= more
        return lost

    def ends(self, jobs: dict[str, str], failing: Collection[str]) -> dict[str, str]:
        """How each of `jobs` ends when those of `failing` fail if they run: success, failed, skipped or manual.

        Ci::PipelineProcessing::AtomicProcessingService and Gitlab::Ci::Status::Composite with `needs`: one that was
        skipped skips the job, whatever its `when` (gitlab-org/gitlab#388866); else one that failed is a failure.
        """
        ends: dict[str, str] = {}

        def end(name: str) -> str:
            if name in ends:
                return ends[name]
            before = {end(need["job"]) for need in self.needs(name) if need["job"] in jobs}
            together = (
                "skipped" if before & {"skipped", "manual"} else "failed" if "failed" in before else "success"
            )
            wanted = {"on_failure": ["failed"], "always": ["success", "failed", "skipped"]}
            if together not in wanted.get(jobs[name], ["success"]):
                ends[name] = "skipped"
            elif jobs[name] == "manual":
                ends[name] = "manual"
            else:
                ends[name] = "failed" if name in failing else "success"
            return ends[name]

        for name in jobs:
            end(name)
        return ends


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
