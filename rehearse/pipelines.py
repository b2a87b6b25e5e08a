"""A pipeline of the emulated GitLab: its jobs chosen, each with its variables, run by an executor and recorded."""

import io
import time
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML

from rehearse import gitlab, rules
from rehearse.gitlab import Event
from rehearse.jobs import Checkout, Executor, NoImage, Outcome, Template, Variable, Work, run_job
from rehearse.rules import Expanded
from tests.gitlab_emulator import GitLabEmulator
from tests.gitlab_emulator.git import git
from tests.gitlab_emulator.rights import DEVELOPER
from tests.gitlab_emulator.state import Job, Json, User

CONCURRENT = 2  # jobs at once
ENDED = ("success", "failed", "skipped", "manual")


@dataclass(frozen=True)
class Run:
    """What became of a pipeline: each job's status as GitLab names it, and seconds."""

    id: int
    jobs: dict[str, str]
    seconds: float
    traces: dict[str, str]
    artifacts: dict[str, dict[str, bytes]]
    not_run: tuple[str, ...] = ()  # jobs whose image is not on this machine, taken for successful

    @property
    def failed(self) -> list[str]:
        return [name for name, status in self.jobs.items() if status == "failed"]

    @property
    def output(self) -> str:
        return "\n".join(f"── {name}: {self.jobs[name]}\n{trace}" for name, trace in self.traces.items())


@dataclass
class Runner:
    """`variables` are the project's, of Settings → CI/CD; `show` prints what the jobs say."""

    emulator: GitLabEmulator
    executor: Executor
    variables: Sequence[gitlab.Variable]
    show: bool = False
    caches: dict[str, bytes] = field(default_factory=dict)

    def run(self, ci: Expanded, event: Event, jobs: Sequence[str] = (), with_needs: bool = True) -> Run:
        """Run the pipeline of an event: all of it, or `jobs` alone or with what they need.

        Raises ValueError where GitLab would make no pipeline: `workflow` forbids it, no job is in it, or a need is not.
        """
        return _Pipeline(self, ci, event).run(jobs, with_needs)


class _Pipeline:
    def __init__(self, runner: Runner, ci: Expanded, event: Event) -> None:
        self.runner, self.ci, self.event = runner, ci, event
        self.emulator, self.project = runner.emulator, runner.emulator.project
        assert self.project.repository is not None
        self.repository = self.project.repository
        predefined = gitlab.predefined(
            self.emulator.url, self.emulator.state.version, self.project.path, self.repository, event
        )
        self.predefined = {name: value for name, value in predefined.items() if value}
        known = rules.values(ci.tree.get("variables")) | self.predefined | self.of_project("*")
        added = ci.workflow(known, event.changed)
        if added is None:
            raise ValueError(f"`workflow` makes no pipeline for {event.ref} by {event.source}")
        self.workflow = added
        self.jobs = ci.chosen(known | added | self.of_project("*"), event.changed)
        if not self.jobs:
            raise ValueError(f"no job is in the pipeline for {event.ref} by {event.source}")
        for name, job in self.jobs.items():
            for need in rules.needs(job) or []:
                if need.job not in self.jobs and not need.optional:
                    raise ValueError(
                        f"'{name}' job needs '{need.job}' job, but '{need.job}' does not exist in the pipeline"
                    )
        self.records: dict[str, Job] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.not_run: list[str] = []

    def of_project(self, environment: str) -> dict[str, str]:
        return {
            each.name: each.value for each in gitlab.visible(self.runner.variables, environment, self.event)
        }

    # ---- Which job when

    def run(self, names: Sequence[str], with_needs: bool) -> Run:
        chosen = self.closure(names) if names and with_needs else list(names) or list(self.jobs)
        self.jobs = {name: job for name, job in self.jobs.items() if name in chosen}
        started = time.monotonic()
        with self.emulator.state.lock:
            state = self.emulator.state
            pipeline = self.started()
            pipeline["status"] = "running"
            self.user: User | None = pipeline["user"]
            self.id = int(pipeline["id"])
            recorded = self.project.jobs.setdefault(self.id, [])
            for name, job in self.jobs.items():
                status = "manual" if job["when"] == "manual" else "created"
                self.records[name] = Job(state.new_id(), name, status)
                recorded.append(self.records[name])
        git(self.repository, "update-ref", f"refs/pipelines/{self.id}", self.event.sha)
        self.schedule()
        with self.emulator.state.lock:
            broken = any(
                record.status == "failed" and not self.may_fail(name) for name, record in self.records.items()
            )
            pipeline["status"] = "failed" if broken else "success"
        return Run(
            self.id,
            {name: record.status for name, record in self.records.items()},
            time.monotonic() - started,
            {name: record.trace for name, record in self.records.items() if record.trace},
            {name: record.artifacts for name, record in self.records.items() if record.artifacts},
            tuple(self.not_run),
        )

    def started(self) -> Json:
        """The pipeline that GitLab has started by itself after a push or a merge; else a new one, run by hand."""
        wanted = {
            "ref": self.event.ref,
            "sha": self.event.sha,
            "source": self.event.source,
            "status": "created",
        }
        for pipeline in self.project.pipelines[::-1]:
            if wanted.items() <= pipeline.items():
                return pipeline
        state, event = self.emulator.state, self.event
        return state.add_pipeline(self.project, event.ref, event.sha, "created", event.source, {})

    def closure(self, names: Sequence[str]) -> set[str]:
        """`names` with all that they need, directly or not."""
        found: set[str] = set()
        left = list(names)
        while left:
            name = left.pop()
            if name not in found:
                found.add(name)
                left += self.before(name)
        return found

    def before(self, name: str) -> list[str]:
        """The jobs that this one waits for, as far as the pipeline has them."""
        job = self.jobs[name]
        needs = rules.needs(job)
        if needs is None:
            stage = self.ci.stages.index(job.get("stage", "test"))
            stages = self.ci.stages[:stage]
            return [other for other, its in self.jobs.items() if its.get("stage", "test") in stages]
        return [need.job for need in needs if need.job in self.jobs]

    def may_fail(self, name: str) -> bool:
        return self.jobs[name].get("allow_failure") not in (None, False)

    def schedule(self) -> None:
        with ThreadPoolExecutor(CONCURRENT) as pool:
            running: dict[Future[None], str] = {}
            while True:
                for name, record in self.records.items():
                    earlier = [
                        (self.records[other].status, self.may_fail(other)) for other in self.before(name)
                    ]
                    if record.status != "created" or not all(status in ENDED for status, _ in earlier):
                        continue
                    if rules.starts(self.jobs[name]["when"], earlier, "needs" in self.jobs[name]):
                        record.status = "running"
                        running[pool.submit(self.run_job, name)] = name
                    else:
                        record.status = "skipped"
                        break  # what waits for it is looked at anew
                else:
                    if not running:
                        return
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        del running[future]
                        future.result()

    # ---- One job

    def run_job(self, name: str) -> None:
        record = self.records[name]
        # It acts for whoever started the pipeline, and may what they may.
        level = self.project.members[self.user.id] if self.user else DEVELOPER
        token = self.emulator.state.add_token(self.project, "job", level, user=self.user).value
        work = self.work(name, record, token)

        def hear(line: str) -> None:
            with self.emulator.state.lock:
                record.trace += f"{line}\n"
            if self.runner.show:
                print(f"  {name} {line.partition(' ')[2][4:]}", flush=True)

        try:
            outcome = run_job(self.runner.executor, work, hear, self.runner.caches)
        except NoImage as error:
            self.not_run.append(name)
            hear(f" 00O Not run: this machine has no image {error}.")
            outcome = Outcome("")
        with self.emulator.state.lock:
            self.emulator.state.tokens.pop(token)  # a job's token dies with it
            self.outcomes[name] = outcome
            record.artifacts = unpack(outcome.archive)
            if outcome.failure:
                record.failure_reason = outcome.failure
            record.status = "failed" if outcome.failure else "success"

    def work(self, name: str, record: Job, token: str) -> Work:
        job = self.jobs[name]
        variables = self.variables(name, record, token)
        template = Template(variables)
        image = job.get("image") or self.ci.tree.get("image") or ""
        image = template.fill(image["name"] if isinstance(image, dict) else image)
        variables["CI_JOB_IMAGE"] = Variable(image)
        depth = int(variables.get("GIT_DEPTH", Variable("20")).value)
        default = self.ci.tree.get("default") or {}
        needs = rules.needs(job)
        given = self.before(name) if needs is None else [need.job for need in needs if need.artifacts]
        return Work(
            name,
            image,
            Checkout(
                f"{self.emulator.url}/{self.project.path}.git",
                token,
                self.event.sha,
                self.refspecs(depth),
                depth,
                variables.get("GIT_STRATEGY", Variable("fetch")).value,
            ),
            variables,
            [*flat(job.get("before_script", default.get("before_script", []))), *flat(job["script"])],
            flat(job.get("after_script", default.get("after_script", []))),
            job.get("artifacts") or {},
            [(other, self.outcomes[other].archive) for other in given if self.has_archive(other)],
            [self.cache(cache, template) for cache in listed(job.get("cache"))],
        )

    def has_archive(self, name: str) -> bool:
        return name in self.outcomes and bool(self.outcomes[name].archive)

    def refspecs(self, depth: int) -> list[str]:
        """As Ci::BuildRunnerPresenter gives them: the pipeline's own ref, with branches and tags where all is fetched."""
        own = f"+refs/pipelines/{self.id}:refs/pipelines/{self.id}"
        if not depth:
            return [own, "+refs/heads/*:refs/remotes/origin/*", "+refs/tags/*:refs/tags/*"]
        if self.event.tag:
            return [own, f"+refs/tags/{self.event.tag}:refs/tags/{self.event.tag}"]
        branch = self.event.branch
        return [own, f"+refs/heads/{branch}:refs/remotes/origin/{branch}"] if branch else [own]

    def variables(self, name: str, record: Job, token: str) -> dict[str, Variable]:
        """Lowest first: predefined, the YAML's, the job's, dotenv of its needs, the project's, the pipeline's own.

        doc/ci/variables/_index.md, "CI/CD variable precedence".
        """
        job = self.jobs[name]
        own = gitlab.of_job(self.emulator.url, self.project.path, self.id, record.id, name, job, token)
        given = self.predefined | own | rules.values(self.ci.tree.get("variables")) | self.workflow
        given |= job["variables"]
        needs = rules.needs(job)
        for other in self.before(name) if needs is None else [need.job for need in needs if need.artifacts]:
            given |= self.outcomes[other].dotenv if other in self.outcomes else {}
        environment = job.get("environment") or ""
        environment = environment["name"] if isinstance(environment, dict) else environment
        environment = Template(given | self.of_project("*")).fill(environment)
        given |= {"CI_ENVIRONMENT_NAME": environment} if environment else {}
        known = given | self.of_project(environment)
        found = {key: Variable(Template(known).fill(value)) for key, value in given.items()}
        for each in gitlab.visible(self.runner.variables, environment, self.event):
            found[each.name] = Variable(each.value, each.file, each.masked)
        for secret in ("CI_JOB_TOKEN", "CI_REGISTRY_PASSWORD"):
            found[secret] = Variable(token, masked=True)
        return found

    def cache(self, cache: Mapping[str, Any], template: Template) -> tuple[str, Sequence[str]]:
        """Its key and paths. Pipelines of protected refs have caches of their own."""
        key = cache.get("key", "default")
        if isinstance(key, dict):
            files = [
                git(self.repository, "rev-parse", f"{self.event.sha}:{file}", check=False)
                for file in key["files"]
            ]
            key = f"{key.get('prefix', '')}-{'-'.join(files)}"
        kind = "protected" if self.event.protected else "non_protected"
        return f"{template.fill(str(key))}-{kind}", cache["paths"]


def expand(text: str) -> Expanded:
    return Expanded(YAML(typ="safe").load(text))


def flat(commands: Any) -> list[str]:
    """A script: one command, or a list of them, nested or not."""
    if isinstance(commands, str):
        return [commands]
    return [command for each in commands for command in flat(each)]


def listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def unpack(archive: bytes) -> dict[str, bytes]:
    if not archive:
        return {}
    with zipfile.ZipFile(io.BytesIO(archive)) as packed:
        return {info.filename: packed.read(info) for info in packed.infolist() if not info.is_dir()}
