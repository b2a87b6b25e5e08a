"""Which jobs a pipeline has: `workflow`, `rules` and `needs` of the expanded YAML, read as GitLab reads them.

By doc/ci/jobs/job_rules.md, doc/ci/yaml/workflow.md and Gitlab::Ci::Status::Composite.
"""

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

TOKEN = re.compile(
    r"""\s*(?: (?P<variable>\$\w+) | "(?P<double>[^"]*)" | '(?P<single>[^']*)' | /(?P<regex>(?:\\.|[^/])*)/
    | (?P<null>null) | (?P<operator>==|!=|=~|!~|&&|\|\||\(|\)) )""",
    re.VERBOSE,
)
KEYWORDS = ("stages", "workflow", "variables", "default", "include")


def evaluate(expression: str, variables: Mapping[str, str]) -> bool:
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
    rules: list[dict[str, Any]], variables: Mapping[str, str], changed: set[str]
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


def values(section: Mapping[str, Any] | None) -> dict[str, str]:
    """A `variables:` section, each as text, with or without a description."""
    texts = {}
    for name, given in (section or {}).items():
        value = given["value"] if isinstance(given, dict) else given
        texts[name] = str(value).lower() if isinstance(value, bool) else str(value)
    return texts


@dataclass(frozen=True)
class Expanded:
    """The YAML after includes, inputs and extends."""

    tree: dict[str, Any]

    @cached_property
    def jobs(self) -> dict[str, dict[str, Any]]:
        return {
            name: job
            for name, job in self.tree.items()
            if name not in KEYWORDS and not name.startswith(".") and isinstance(job, dict)
        }

    @property
    def stages(self) -> list[str]:
        return [".pre", *self.tree.get("stages", ["build", "test", "deploy"]), ".post"]

    def workflow(self, variables: Mapping[str, str], changed: set[str]) -> dict[str, str] | None:
        """The variables that `workflow` adds; None where it makes no pipeline."""
        rules = self.tree.get("workflow", {}).get("rules")
        rule = matching_rule(rules, variables, changed) if rules else {}
        return None if rule is None or rule.get("when") == "never" else values(rule.get("variables"))

    def chosen(self, variables: Mapping[str, str], changed: set[str]) -> dict[str, dict[str, Any]]:
        """The jobs of a pipeline, in the order of their stages, each as its own keywords with its rule's over them."""
        jobs = {}
        for name, job in sorted(
            self.jobs.items(), key=lambda item: self.stages.index(item[1].get("stage", "test"))
        ):
            rule = matching_rule(job["rules"], variables, changed) if "rules" in job else {}
            if rule is None or rule.get("when", job.get("when")) == "never":
                continue
            over = {key: rule[key] for key in ("when", "allow_failure") if key in rule}
            given: dict[str, Any] = {**(job.get("variables") or {}), **(rule.get("variables") or {})}
            jobs[name] = {"when": "on_success", **job, **over, "variables": values(given)}
        return jobs

    def pipeline(self, variables: dict[str, str], changed: set[str] | None = None) -> dict[str, str]:
        """The jobs of a pipeline with their `when`; none where `workflow` makes no pipeline. "" counts as unset."""
        known = values(self.tree.get("variables")) | {
            name: value for name, value in variables.items() if value
        }
        added = self.workflow(known, changed or set())
        if added is None:
            return {}
        return {name: job["when"] for name, job in self.chosen(known | added, changed or set()).items()}


@dataclass(frozen=True)
class Need:
    job: str
    artifacts: bool
    optional: bool


def needs(job: Mapping[str, Any]) -> list[Need] | None:
    """None where the job waits for all earlier stages."""
    if "needs" not in job:
        return None
    given: list[dict[str, Any]] = [{"job": each} if isinstance(each, str) else each for each in job["needs"]]
    return [Need(each["job"], each.get("artifacts", True), each.get("optional", False)) for each in given]


def starts(when: str, statuses: Iterable[tuple[str, bool]], by_needs: bool) -> bool:
    """Whether a job runs after those it waits for, given as their status and whether they were allowed to fail.

    One of its `needs` that was skipped keeps it from running, even `when: on_failure` (gitlab-org/gitlab#388866).
    """
    ended = list(statuses)
    failed = any(status == "failed" and not allowed for status, allowed in ended)
    left_out = [status in ("skipped", "manual") for status, allowed in ended]
    if by_needs:
        together = "skipped" if any(left_out) else "failed" if failed else "success"
    else:
        together = "failed" if failed else "skipped" if ended and all(left_out) else "success"
    if when == "always":
        return True
    if when == "on_failure":
        return together == "failed"
    return together == "success" or (together == "skipped" and not by_needs)
