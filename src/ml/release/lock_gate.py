"""Judge dvc.lock without downloading the data: is it the result of running this code on these params and data?

    python -m ml.release.lock_gate [--since REV | --since-baseline] [--receipt FILE] [--require-receipts]

For each stage: its inputs are those of the working folder, a run record on a remote says that this was run with these
outputs, no other record of the same inputs disagrees, and every output is on a remote in its full size. What that
cannot prove is in docs/remotes.md.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dvc.repo import Repo
from dvc.stage import PipelineStage

from ml import git
from ml.errors import UserError, exit_on_user_error
from ml.lock import LOCK, parse_file, parse_stage as parse_locked
from ml.release import provenance, receipt
from ml.release.provenance import Entry, key_of, receipt_path, record_path, value_of
from ml.release.receipt import parse_stage as parse_receipt
from ml.remotes import Place, places
from ml.settings import load_settings

Problem = Literal["stale", "forged", "poisoned", "missing", "damaged", "unvouched"]

REMEDIES: dict[Problem, str] = {
    "stale": "Run the pipeline again (`dvc repro`), push with `dvc push --run-cache`, and commit dvc.lock; "
    "or leave dvc.lock as it is on the target branch: the release will write it.",
    "forged": "Nobody has run this: a merge of git's or a hand put it together, or its record was never pushed. "
    "If it was run, `dvc push --run-cache` from there; else `dvc repro --force STAGE`, push, and commit dvc.lock.",
    "poisoned": "Find out who wrote the record, delete the wrong one from the remote, and run the stage anew: "
    "`python -m ml.release.pipeline --force`.",
    "missing": "Run `dvc push --run-cache` where the outputs are, or let the merge request's pipeline make them.",
    "damaged": "Delete it from the remote and push it again from a machine that has it right.",
    "unvouched": "Let the merge request's pipeline run it (`python -m ml.release.pipeline --force`).",
}


@dataclass(frozen=True)
class Finding:
    stage: str
    problem: Problem
    detail: str

    def __str__(self) -> str:
        return f"{self.stage}: {self.problem}: {self.detail}"


def judge(given: receipt.Receipt | None = None, require_receipts: bool = False) -> list[Finding]:
    """Everything that is wrong with dvc.lock in the working folder; nothing where it is right.

    Args:
        given: a pipeline's receipt that dvc.lock has to agree with.
        require_receipts: each stage needs the receipt of a pipeline that ran it, a run record alone is not enough.

    Raises:
        UserError: dvc.lock is missing or no dvc.lock, there is no remote, or one cannot be asked.
    """
    if not Path(LOCK).exists():
        raise UserError(f"{LOCK} is missing. Run `dvc repro`, or `python -m ml.release.pipeline`.")
    entries = provenance.read_entries()
    with Repo() as repo:
        where = places(repo)
        if not where:
            raise UserError(
                "No DVC remote is configured. Set DVC_REMOTE_URL and run `python -m ml.release.remote`."
            )
        stages = {stage.name: stage for stage in provenance.pipeline_stages(repo)}
        findings = []
        for name, stage in stages.items():
            if name in entries:
                findings += judge_stage(repo, stage, entries[name], where, given, require_receipts)
            else:
                findings.append(Finding(name, "stale", f"dvc.yaml has this stage, and {LOCK} has not"))
        findings += surplus(entries, stages)
        findings += absent(repo, {name: entries[name] for name in stages if name in entries}, where)
    return findings


def judge_stage(
    repo: Repo,
    stage: PipelineStage,
    entry: Entry,
    where: list[Place],
    given: receipt.Receipt | None,
    require_receipts: bool,
) -> list[Finding]:
    present = provenance.present_entry(repo, stage, where)
    if present is None:
        return []  # what it reads has no entry, which is a finding of its own
    if changed := differences(entry, present):
        return [Finding(stage.name, "stale", "; ".join(changed[:5]))]
    if not provenance.can_be_recorded(stage):
        return [Finding(stage.name, "unvouched", "its settings in dvc.yaml keep DVC from recording runs")] * (
            require_receipts
        )
    findings = judge_records(stage.name, entry, where, require_receipts)
    if given is not None:
        recorded = {each.name: each for each in given.stages}.get(stage.name)
        if recorded is None or recorded.value != value_of(entry):
            found = "lacks the stage" if recorded is None else f"has the result {recorded.value[:12]}"
            detail = (
                f"{LOCK} has the result {value_of(entry)[:12]}, and the receipt of {given.commit[:8]} {found}"
            )
            findings.append(Finding(stage.name, "forged", detail))
    return findings


def differences(entry: Entry, present: Entry) -> list[str]:
    """What of the inputs differs, in words. Names of the outputs count, their hashes do not."""
    locked, now = parse_locked(entry), parse_locked(present | {"outs": []})
    found = []
    if locked.command != now.command:
        found.append(f"the command was `{locked.command}`, and is `{now.command}`")
    for path in sorted(locked.deps.keys() | now.deps.keys()):
        if locked.deps.get(path) != now.deps.get(path):
            found.append(f"{path} {change(path in locked.deps, path in now.deps)}")
    for key in sorted(locked.params.keys() | now.params.keys()):
        if locked.params.get(key) != now.params.get(key) or (key in locked.params) != (key in now.params):
            old, new = (repr(side.params.get(key, "absent"))[:60] for side in (locked, now))
            found.append(f"{key} was {old}, and is {new}")
    named = [{str(out["path"]) for out in each.get("outs", [])} for each in (entry, present)]
    if named[0] != named[1]:
        found.append(
            f"outputs {', '.join(sorted(named[0] ^ named[1]))} are in one of dvc.yaml and {LOCK} only"
        )
    if not found and key_of(entry) != key_of(present):
        found.append(f"{LOCK} was written by another version of DVC")
    return found


def change(before: bool, after: bool) -> str:
    return "changed" if before and after else "is new" if after else "is no dependency any more"


def judge_records(name: str, entry: Entry, where: list[Place], require_receipts: bool) -> list[Finding]:
    """Whether a run record and a receipt vouch for the entry, and nothing contradicts them."""
    key, value = key_of(entry), value_of(entry)
    findings: list[Finding] = []
    others: dict[str, tuple[Entry | None, bool]] = {}
    vouched = received = False
    for place in where:
        named = set(place.names(record_path(key, "").rstrip("/")))
        named |= {each.removesuffix(".json") for each in place.names(f"receipts/{key[:2]}/{key}")}
        for found in sorted({value, *named}):
            content = place.read(record_path(key, found))
            by_pipeline = parse_receipt(place.read(receipt_path(key, found)), key, found) is not None
            record = provenance.parse_record(content, key, found)
            at = f"{record_path(key, found)} on remote {place.name}"
            if content is not None and record is None:
                findings.append(Finding(name, "poisoned", f"the content of {at} is not what its name says"))
            if found == value:
                vouched, received = vouched or record is not None, received or by_pipeline
            elif record is not None or by_pipeline:
                others[at] = (record, by_pipeline)
    ours = record_path(key, value)
    for at, (record, by_pipeline) in others.items():
        if by_pipeline and received:
            continue  # two pipelines on two kinds of machine may both be right
        detail = f"{at} says that the same inputs gave another {outputs_that_differ(entry, record)}"
        if received:
            findings.append(Finding(name, "poisoned", f"{detail}, and no pipeline has made that"))
        elif vouched:
            findings.append(Finding(name, "poisoned", f"{detail} than {ours}"))
        else:
            findings.append(
                Finding(
                    name,
                    "forged",
                    f"{detail}: {LOCK} was edited by hand or by a merge, or that record is poisoned",
                )
            )
    if not vouched and not others:
        detail = "no remote has a record of a run with these inputs and outputs"
        findings.append(Finding(name, "forged", f"{detail} ({ours})"))
    elif vouched and require_receipts and not received:
        findings.append(Finding(name, "unvouched", "it has a run record, and no pipeline's receipt"))
    return findings


def outputs_that_differ(entry: Entry, record: Entry | None) -> str:
    if record is None:  # a receipt alone
        return "result"
    one, other = (dict(map(parse_file, each["outs"])) for each in (entry, record))
    return ", ".join(path for path in sorted(one) if one[path] != other.get(path))


def surplus(entries: dict[str, Entry], stages: dict[str, PipelineStage]) -> list[Finding]:
    """Entries of stages that dvc.yaml has not, where they claim an output that another stage makes."""
    made = {out["path"] for name in stages if name in entries for out in entries[name].get("outs", [])}
    return [
        Finding(
            name,
            "forged",
            f"dvc.yaml has no such stage, and {LOCK} says that it makes {', '.join(sorted(both))}",
        )
        for name, entry in entries.items()
        if name not in stages and (both := made & {out["path"] for out in entry.get("outs", [])})
    ]


def absent(repo: Repo, entries: dict[str, Entry], where: list[Place]) -> list[Finding]:
    """Outputs and data that no remote has, or has in another size."""
    owners = {"data": provenance.sources(repo)} | {
        name: [out for out in entry.get("outs", []) if "md5" in out] for name, entry in entries.items()
    }
    findings = []
    for name, outs in owners.items():
        wanted, damages = provenance.objects(repo, outs, where)
        damages += provenance.missing(repo, wanted, where)
        for damage in damages:
            problem: Problem = "missing" if "missing" in damage.problem else "damaged"
            findings.append(Finding(name, problem, str(damage)))
    return findings


def unchanged_since(revision: str) -> bool:
    """Whether dvc.lock is that of the revision. Raises UserError when git cannot tell."""
    # GitLab writes "none" as zeros; a project's first merge request has no dvc.lock on either side
    committed = git.show(git.resolve(revision), LOCK) if revision.strip("0") else None
    return committed == (Path(LOCK).read_bytes() if Path(LOCK).exists() else None)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ml.release.lock_gate", description="Judge dvc.lock without downloading the data."
    )
    since = parser.add_mutually_exclusive_group()
    since.add_argument(
        "--since", metavar="REV", help="pass when dvc.lock is that of REV: it claims nothing new"
    )
    since.add_argument(
        "--since-baseline",
        action="store_true",
        help="the same for the commit that a merge request is compared with",
    )
    parser.add_argument("--receipt", type=Path, help="a pipeline's receipt that dvc.lock has to agree with")
    parser.add_argument("--require-receipts", action="store_true", help="a run record alone is not enough")
    arguments, settings = parser.parse_args(), load_settings()
    revision: str | None = arguments.since
    if arguments.since_baseline:
        revision = settings.require_baseline("--since")
    if revision is not None and unchanged_since(revision):
        print(
            f"{LOCK} is that of {revision[:12]}: nothing is claimed, so nothing is judged.",
            file=sys.stderr,
        )
        return
    given = receipt.load(arguments.receipt) if arguments.receipt else None
    findings = judge(given, arguments.require_receipts)
    if findings:
        lines = [f"  {finding}" for finding in findings[:30]]
        remedies = [
            f"- {problem}: {remedy}"
            for problem, remedy in REMEDIES.items()
            if problem in {finding.problem for finding in findings}
        ]
        raise UserError(
            f"{LOCK} is not right; {len(findings)} finding{'s' if len(findings) > 1 else ''}:\n"
            + "\n".join(lines + remedies)
        )
    print(
        f"{LOCK} is right: every stage was run as it says, and its outputs are on the remotes.",
        file=sys.stderr,
    )


if __name__ == "__main__":
    exit_on_user_error(main)
