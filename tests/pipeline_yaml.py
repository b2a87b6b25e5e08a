"""The expanded .gitlab-ci.yml: who runs what, in which image, what a commit stops, what a failure skips; and
gitlab-ci-local's own reading of its rules, which skips `workflow`."""

import json
import re
import subprocess
from collections.abc import Collection
from pathlib import Path

from rehearse import gitlab, pipelines, rules, runner
from rehearse.project import ROOT


class Expanded(rules.Expanded):
    """What a rehearsal has no use for: it looks at pipelines that nobody runs.

    `variables` are what GitLab sets for a pipeline and a project has set, before the file's own; "" counts as unset.
    """

    def known(self, variables: dict[str, str], changed: Collection[str] = ()) -> dict[str, str] | None:
        """The variables of a pipeline, `workflow`'s among them; None where it makes no pipeline."""
        known = rules.values(self.tree.get("variables")) | given(variables)
        added = self.workflow(known, set(changed))
        return None if added is None else known | added

    def resolve(self, job: str, text: str, variables: dict[str, str], changed: Collection[str] = ()) -> str:
        """`text` of a job with what GitLab and the runner put in for its variables."""
        known = self.known(variables, changed)
        assert known is not None
        known |= self.chosen(known, set(changed))[job]["variables"] | given(variables)
        for _ in range(5):  # values name other variables
            text = re.sub(r"\$(\w+)", lambda match: known.get(match[1], ""), text)
        return text

    def image(self, job: str, variables: dict[str, str], changed: Collection[str] = ()) -> str:
        return self.resolve(job, self.jobs[job]["image"]["name"], variables, changed)

    def lost(self, variables: dict[str, str], changed: Collection[str] = ()) -> set[str]:
        """The jobs that a newer commit on the same ref may stop, and those that then do not start.

        By workflow:rules:auto_cancel, else workflow:auto_cancel, else `conservative` (doc/ci/yaml/_index.md,
        Ci::PipelineCreation::CancelRedundantPipelinesService): `none` stops nothing, `interruptible` the jobs that are,
        `conservative` all before the first that is not has started.
        """
        known = self.known(variables, changed)
        if known is None:
            return set()
        workflow = self.tree["workflow"]
        rule = rules.matching_rule(workflow["rules"], known, set(changed)) or {}
        mode = (workflow.get("auto_cancel", {}) | rule.get("auto_cancel", {})).get(
            "on_new_commit", "conservative"
        )
        jobs = self.chosen(known, set(changed))
        if mode == "none":
            return set()
        lost = {name for name, job in jobs.items() if mode == "conservative" or job.get("interruptible")}
        while more := {name for name in set(jobs) - lost if lost & self.needed(name)}:
            lost |= more
        return lost

    def needed(self, job: str) -> set[str]:
        return {need.job for need in rules.needs(self.jobs[job]) or []}

    def ends(self, jobs: dict[str, str], failing: Collection[str]) -> dict[str, str]:
        """How each of `jobs` (name → when) ends if those of `failing` fail where they run: success, failed, skipped, manual.

        Ci::PipelineProcessing::AtomicProcessingService with `needs`.
        """
        ends: dict[str, str] = {}

        def end(name: str) -> str:
            if name not in ends:
                before = [(end(need), False) for need in self.needed(name) & set(jobs)]
                if not rules.starts(jobs[name], before, by_needs=True):
                    ends[name] = "skipped"
                elif jobs[name] == "manual":
                    ends[name] = "manual"
                else:
                    ends[name] = "failed" if name in failing else "success"
            return ends[name]

        return {name: end(name) for name in jobs}


def given(variables: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if value}


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


def expand(folder: Path, variables: dict[str, str] | None = None) -> Expanded:
    """Also checks the expanded YAML against GitLab's schema, as gitlab-ci-local does by itself."""
    return Expanded(pipelines.expand(runner.preview(folder, variables or gitlab.branch())).tree)


def listed(folder: Path, variables: dict[str, str]) -> dict[str, str]:
    """The jobs that gitlab-ci-local would run, with their `when`."""
    jobs = json.loads(runner.ask(folder, variables, "--list-json", "--no-json-schema-validation"))
    return {job["name"]: job["when"] for job in jobs if job["when"] != "never"}
