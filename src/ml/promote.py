"""Move a registered model through its life cycle, and say where the one in production came from.

    python -m ml.promote VERSION --to staging --why "…"      # VERSION: 3, model-v1.2.0, or a stage such as staging
    python -m ml.promote demote VERSION --why "…"            # one step down, or --to STAGE
    python -m ml.promote rollback --why "…"                  # the champion before this one
    python -m ml.promote trace champion                      # which data, code and params made it; how to make it again
    python -m ml.promote check VERSION | history [VERSION] | status | best | register FOLDER --gate passed

candidate → staging → challenger (A/B test) → champion (production) → archived. What has no complete trace, has not passed
the gate, or is worse than the champion is refused. Exit code 0: done; 1: refused or not possible; 2: wrong usage.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml.errors import UserError, exit_on_user_error
from ml.lock import flat
from ml.settings import Settings, load_settings
from ml.tracking import lifecycle, registry
from ml.tracking.client import without_password
from ml.tracking.lifecycle import STAGES, UP, WHY_LIMIT, Entry, Stage, State
from ml.tracking.store import Change, Registry, Version, numbers
from ml.tracking.trace import Finding, check

LOWER_IS_BETTER = frozenset({"loss", "calibration_error"})  # as the report has it
FACTS = ("model_tag", "model_sha256", "git_commit", "data_hash", "lock_sha256", "gate", "comment_url")
LINKS = ("merge_request_url", "ci_job_url", "ci_pipeline_url")
TARGETS = sorted({to for ways in UP.values() for to in ways}, key=STAGES.index)


def findings(registry: Registry, version: Version, state: State, settings: Settings) -> list[Finding]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            lies = registry.download(version, Path(folder))
        except Exception as error:  # whatever its storage raises: then its files are what is missing
            why = without_password((str(error).splitlines() or [type(error).__name__])[0])[:200]
            return [Finding("artifacts", f"they cannot be downloaded ({why})")]
        return check(registry, version, state, settings, lies)


def require_trace(registry: Registry, version: Version, state: State, settings: Settings) -> None:
    missing = [each for each in findings(registry, version, state, settings) if each.problem]
    if missing:
        lines = "\n".join(f"  {each.piece}: {each.problem}" for each in missing)
        raise UserError(
            f"Version {version.version} ({version.tag or 'no release'}) has no complete trace:\n{lines}\n"
            "Nothing was changed. Release the model again from its commit (`python -m ml.release.publish`)."
        )


def regression(version: Version, champion: Version) -> str | None:
    """Why the version may be worse than the champion; None when it is as good, within report.margin."""
    params, ours, theirs = (
        json.loads(each) for each in (version.tags["params"], *metrics_of(version, champion))
    )
    report = params.get("report", {})
    name, margin = str(report.get("primary_metric")), float(report.get("margin", 0.0))
    if version.tags["data_hash"] != champion.tags["data_hash"]:
        return "its data is other than the champion's, so their numbers cannot be compared"
    values = [numbers(each).get(name) for each in (ours, theirs)]
    if values[0] is None or values[1] is None:
        return f"one of the two has no {name}, so they cannot be compared"
    gain = (values[0] - values[1]) * (-1 if name in LOWER_IS_BETTER else 1)
    if gain >= -margin:
        return None
    return f"its {name} is {values[0]:.6g}, the champion's {values[1]:.6g}: {-gain:.6g} worse, beyond the margin of {margin:g}"


def metrics_of(*versions: Version) -> list[str]:
    return [version.tags.get("metrics", "{}") for version in versions]


def promote(settings: Settings, name: str, to: Stage, why: str, accepted: str | None) -> Entry:
    with registry.reaching(settings, f"promoting {name}") as reg:
        state = reg.state()
        version = reg.version(state.resolve(name))
        lifecycle.check_promotion(state, version.version, to)
        require_trace(reg, version, state, settings)

        def decide(state: State) -> Change:
            lifecycle.check_promotion(state, version.version, to)
            champion = state.holder("champion")
            worse = None
            if champion is not None and champion != version.version:
                worse = regression(version, reg.version(champion))
            if worse is not None and accepted is None:
                raise UserError(
                    f"Version {version.version} ({version.tag}) does not pass the gate: {worse}.\n"
                    'To promote it nevertheless, give the reason: --accept-regression "…". It is kept in the trail.'
                )
            return Change(
                "promote", lifecycle.moves_to(state, version.version, to), why, accepted if worse else None
            )

        return changed(reg, settings, decide)


def demote(settings: Settings, name: str, to: Stage | None, why: str) -> Entry:
    with registry.reaching(settings, f"demoting {name}") as reg:
        version = reg.state().resolve(name)

        def decide(state: State) -> Change:
            target = lifecycle.demotion(state, version, to)
            return Change("demote", lifecycle.moves_to(state, version, target), why)

        return changed(reg, settings, decide)


def rollback(settings: Settings, name: str | None, why: str) -> Entry:
    with registry.reaching(settings, "rolling back") as reg:
        state = reg.state()
        target = lifecycle.rollback_target(state, state.resolve(name) if name else None)
        require_trace(reg, reg.version(target), state, settings)

        def decide(state: State) -> Change:
            if lifecycle.rollback_target(state, target if name else None) != target:
                raise UserError(
                    "Somebody has changed the champion meanwhile. Look at `python -m ml.promote status`."
                )
            return Change("rollback", lifecycle.moves_to(state, target, "champion"), why)

        return changed(reg, settings, decide)


def changed(reg: Registry, settings: Settings, decide: Callable[[State], Change]) -> Entry:
    entry = reg.change(registry.who(settings), decide)
    assert entry is not None
    return entry


def trace(settings: Settings, name: str, as_json: bool) -> bool:
    """Print where a version came from. False when a piece is missing or untrue."""
    with registry.reaching(settings, f"tracing {name}") as reg:
        state = reg.state()
        version = reg.version(state.resolve(name))
        problems = [each for each in findings(reg, version, state, settings) if each.problem]
        elsewhere = misplaced(reg, state)
    history = [
        entry.describe(move)
        for entry in state.entries
        for move in entry.moves
        if move.version == version.version
    ]
    tags = version.tags
    known: dict[str, str] = {
        "model": f"{version.name} {version.version}",
        "stage": state.stages[version.version],
        **{key: tags.get(key, "unknown") for key in FACTS},
        **{key: tags[key] for key in LINKS if key in tags},
        "run_id": version.run_id,
        "load": version.uri,
        "reproduce": f"python -m ml.release.reproduce {tags.get('git_commit', 'unknown')}",
    }
    trees = {key: load(tags.get(key, "{}")) for key in ("params", "metrics")}
    if as_json:
        found = {each.piece: each.problem for each in problems}
        print(
            json.dumps(
                known | trees | {"history": history, "problems": found, "misplaced": elsewhere}, indent=2
            )
        )
        return not problems
    width = max(map(len, known))
    print("\n".join(f"{key:<{width}}  {value}" for key, value in known.items()))
    for key, tree in trees.items():
        print(f"\n{key}")
        print("\n".join(f"  {each}: {value}" for each, value in flat(tree).items()))
    print("\nhistory")
    print("\n".join(f"  {line}" for line in history))
    print()
    say(problems, elsewhere)
    return not problems


def load(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {}


def say(problems: list[Finding], elsewhere: list[str]) -> None:
    for each in problems:
        print(f"NOT TRUE OR MISSING: {each.piece}: {each.problem}")
    print("\n".join(elsewhere) if elsewhere else "", end="\n" if elsewhere else "")
    if not problems:
        print("The trace is complete: every piece was checked against git, dvc.lock, the run and the files.")


def misplaced(reg: Registry, state: State) -> list[str]:
    """What somebody has moved past the trail."""
    aliases, wanted = reg.aliases(), dict(state.aliases)
    return [
        f"ALIAS MOVED BY HAND: {alias} points to {aliases.get(alias, 'nothing')}, the trail says "
        f"{wanted.get(alias, 'nothing')}. The next change puts it back; `python -m ml.promote settle` does so now."
        for alias in STAGES
        if aliases.get(alias) != wanted.get(alias)
    ]


def show_check(settings: Settings, name: str) -> bool:
    with registry.reaching(settings, f"checking {name}") as reg:
        state = reg.state()
        found = findings(reg, reg.version(state.resolve(name)), state, settings)
    for each in found:
        print(f"{each.piece:<10} {each.problem or 'ok'}")
    return not any(each.problem for each in found)


def show_history(settings: Settings, name: str | None) -> None:
    with registry.reaching(settings, "reading the trail") as reg:
        state = reg.state()
    version = state.resolve(name) if name else None
    for entry in state.entries:
        for move in entry.moves:
            if version in (None, move.version):
                print(entry.describe(move))
    if not state.entries:
        print("Nothing has been registered yet.", file=sys.stderr)


def show_status(settings: Settings) -> bool:
    with registry.reaching(settings, "reading the trail") as reg:
        state = reg.state()
        elsewhere = misplaced(reg, state) if state.entries else []
    for stage in reversed(STAGES):
        versions = [f"{each} ({state.tags[each]})" for each, at in state.stages.items() if at == stage]
        print(f"{stage:<10} {', '.join(reversed(versions)) or '–'}")
    print("\n".join(elsewhere), end="\n" if elsewhere else "")
    return not elsewhere


def settle(settings: Settings) -> None:
    with registry.reaching(settings, "settling") as reg:
        if reg.entries():
            reg.settle()
    print("Aliases and tags are as the trail says.")


def show_best(settings: Settings, metric: str, count: int) -> None:
    highest = not (metric in LOWER_IS_BETTER or metric.endswith("loss"))
    runs = registry.best_runs(settings, metric, highest, count)
    if not runs:
        raise UserError(
            f"No finished run of experiment {settings.mlflow_experiment_name!r} has a metric {metric!r}. "
            "Choose another by --metric, or the experiment by MLFLOW_EXPERIMENT_NAME."
        )
    for run in runs:
        commit = run.data.tags.get("git_commit", "unknown")
        print(f"{metric} {run.data.metrics[metric]:.6g}  run {run.info.run_id}  commit {commit[:8]}")
    print(f"Make the best again: python -m ml.release.reproduce {runs[0].info.run_id}")


def reason(text: str) -> str:
    """`why` as an argument: one line, not empty, of a length that every server takes."""
    text = " ".join(text.split())
    if not 1 <= len(text) <= WHY_LIMIT:
        raise argparse.ArgumentTypeError(f"give a reason of 1 to {WHY_LIMIT} characters")
    return text


def positive(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ml.promote",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, version: str | None = "", why: bool = False) -> argparse.ArgumentParser:
        each = commands.add_parser(name, help=help, description=help)
        if version is not None:
            each.add_argument(
                "version", metavar="VERSION", nargs=version or None, help="version, release tag or stage"
            )
        if why:
            each.add_argument("--why", type=reason, required=True, metavar="TEXT", help="kept in the trail")
        return each

    up = command("promote", "one step up (the word itself may be left out)", why=True)
    up.add_argument("--to", choices=TARGETS, required=True)
    up.add_argument(
        "--accept-regression", type=reason, metavar="REASON", help="for one worse than the champion"
    )
    command("demote", "down", why=True).add_argument("--to", choices=STAGES)
    command("rollback", "to the champion before this one, or an earlier one", "?", why=True)
    command("trace", "which data, code and params made it").add_argument("--json", action="store_true")
    command("check", "each piece of its trace")
    command("history", "every change: when, who, from, to, why", "?")
    entering = command(
        "register", "put a bundle of this checkout's results in as a candidate; a release does it", None
    )
    entering.add_argument("folder", type=Path, help="such as models/model-v1.2.0, by `python -m ml.bundle`")
    entering.add_argument("--gate", choices=registry.GATES, required=True, help="what the gate said")
    entering.add_argument(
        "--comment-url", metavar="URL", help="the comment that was reviewed; without it, no promotion"
    )
    command("status", "which version is at which stage", None)
    command("settle", "put aliases and tags back to what the trail says", None)
    best = command("best", "the runs with the best value of a metric, and how to make the first again", None)
    best.add_argument("--metric", default="accuracy")
    best.add_argument("--count", type=positive, default=5)
    if arguments and not arguments[0].startswith("-") and arguments[0] not in commands.choices:
        arguments = ["promote", *arguments]
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse(sys.argv[1:])
    settings = load_settings()
    entry, fine = None, True
    match arguments.command:
        case "promote":
            accepted = arguments.accept_regression
            entry = promote(settings, arguments.version, arguments.to, arguments.why, accepted)
        case "demote":
            entry = demote(settings, arguments.version, arguments.to, arguments.why)
        case "rollback":
            entry = rollback(settings, arguments.version, arguments.why)
        case "trace":
            fine = trace(settings, arguments.version, arguments.json)
        case "check":
            fine = show_check(settings, arguments.version)
        case "history":
            show_history(settings, arguments.version)
        case "register":
            version = registry.register(
                settings, arguments.folder, gate=arguments.gate, comment_url=arguments.comment_url
            )
            print(f"{version.version} ({version.tag}): {version.uri}")
        case "status":
            fine = show_status(settings)
        case "settle":
            settle(settings)
        case "best":
            show_best(settings, arguments.metric, arguments.count)
    if entry is not None:
        for move in entry.moves:
            print(f"{move.version} ({move.tag}): {move.origin} → {move.to}")
    if not fine:
        sys.exit(1)


if __name__ == "__main__":
    exit_on_user_error(main)
