"""`make bench`: this project beside its peers on this machine. Ratios are of medians of interleaved runs.

python -m benchmarks                all parts
python -m benchmarks speed --rounds 5
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml import files
from ml.errors import UserError, exit_on_user_error
from ml.parallel import KEEP_FREED_MEMORY

RESULTS = files.REPORTS / "bench"
TARGET = 0.99
Answer = dict[str, Any]


def core_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_count() -> int:
    """For one seed over several processes: one per GPU, else per core; a power of two, to share a batch evenly."""
    import torch

    places = torch.cuda.device_count() or min(core_count(), 128)
    return 1 << (places.bit_length() - 1)


def last_json(output: str) -> Answer:
    answer: Answer = json.loads(output.strip().splitlines()[-1])
    return answer


def start(command: list[str], **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: "subprocess.Popen[str]") -> Answer:
    output, errors = process.communicate()
    if process.returncode:
        raise UserError(f"{' '.join(map(str, process.args))} failed:\n{errors}")  # type: ignore[arg-type]
    return last_json(output)


def usual(threads: int, workers: int, *more: str) -> Answer:
    options = ["--threads", str(threads), "--workers", str(workers), *more]
    return finish(start([sys.executable, "-m", "benchmarks.usual", *options], OMP_NUM_THREADS=str(threads)))


def ours(values: Answer, seed: int = 0, threads: int = 1, processes: int = 1) -> Answer:
    """One seed over `processes` processes of `threads` threads each."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    # As the train stage does, which sets the allocator for its own workers but cannot for torchrun's.
    allocator = {"GLIBC_TUNABLES": KEEP_FREED_MEMORY} if processes == 1 else {}
    options = ["--seed", str(seed), "--set", json.dumps(values | {"threads": threads})]
    return finish(start([*launcher, "benchmarks.ours", *options], OMP_NUM_THREADS=str(threads), **allocator))


def ours_side_by_side(seeds: int, values: Answer) -> Answer:
    """`seeds` seeds at once, one process and one thread each, as the train stage does; samples/s of all together."""
    with tempfile.TemporaryDirectory() as folder:
        go = Path(folder) / "go"
        ready = [Path(folder) / str(seed) for seed in range(seeds)]
        processes = []
        for seed, file in enumerate(ready):
            options = [
                "--seed",
                str(seed),
                "--set",
                json.dumps(values),
                "--ready",
                str(file),
                "--wait-for",
                str(go),
            ]
            command = [sys.executable, "-m", "benchmarks.ours", *options]
            processes.append(start(command, OMP_NUM_THREADS="1", GLIBC_TUNABLES=KEEP_FREED_MEMORY))
        while not all(file.exists() for file in ready) and all(
            process.poll() is None for process in processes
        ):
            time.sleep(0.01)
        go.touch()
        answers = [finish(process) for process in processes]
    samples = sum(answer["samples_per_s"] * answer["seconds"] for answer in answers)
    return {
        "samples_per_s": samples / max(answer["seconds"] for answer in answers),
        "accuracy": statistics.mean(answer["accuracy"] for answer in answers),
    }


def interleaved(sides: dict[str, Callable[[], Answer]], rounds: int) -> dict[str, list[Answer]]:
    """Every side once a round, so that a drift of the machine meets all of them."""
    found: dict[str, list[Answer]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, side in sides.items():
            found[name].append(side())
            print(
                f"  round {number + 1}/{rounds}  {name}: {shown(found[name][-1])}",
                file=sys.stderr,
                flush=True,
            )
    return found


def shown(answer: Answer) -> str:
    return ", ".join(f"{key} {value:,.4g}" for key, value in answer.items() if isinstance(value, float))


def median(answers: list[Answer], key: str) -> float:
    return statistics.median(answer[key] for answer in answers)


def ratio(text: str, value: float, goal: float, n: int, at_most: bool = False) -> str:
    met = value <= goal if at_most else value >= goal
    return f"{text}: {value:.2f} (n = {n}; goal: {'at most' if at_most else 'at least'} {goal:g}; {'met' if met else 'NOT met'})"


def speed(rounds: int) -> list[str]:
    """Training samples per second, one epoch on MNIST's 60,000 training images."""
    cores = core_count()
    steps = ["--steps", "150"]
    sides: dict[str, Callable[[], Answer]] = {}
    for workers in (0, 1, 2):
        for threads in sorted({1, cores}):
            sides[f"usual, {workers} workers, {threads} threads"] = lambda t=threads, w=workers: usual(t, w, *steps)  # type: ignore[misc]
    one_epoch = {"epochs": 1, "batch_size": 256}
    sides["ours, one seed, 1 thread"] = lambda: ours(one_epoch)
    sides[f"ours, one seed, {cores} threads"] = lambda: ours(one_epoch, threads=cores)
    if process_count() > 1:
        sides[f"ours, one seed, {process_count()} processes"] = lambda: ours(
            one_epoch, processes=process_count()
        )
    sides[f"ours, {cores} seeds side by side"] = lambda: ours_side_by_side(cores, one_epoch)
    found = interleaved(sides, rounds)
    whole_epoch = usual(cores, 0)
    rates = {name: median(answers, "samples_per_s") for name, answers in found.items()}
    as_run = rates[f"usual, 0 workers, {cores} threads"]
    best = max(rate for name, rate in rates.items() if name.startswith("usual"))
    one = max(rate for name, rate in rates.items() if name.startswith("ours, one"))
    lines = [f"{name}: {rate:,.0f} samples/s" for name, rate in rates.items()]
    accuracy = {
        name: median(answers, "accuracy") for name, answers in found.items() if name.startswith("ours")
    }
    lines += [
        f"test accuracy after this epoch: usual (Adam 0.001) {whole_epoch['accuracies'][-1]:.2%}, ours {min(accuracy.values()):.2%}",
        ratio("one seed against the usual loop as most run it", one / as_run, 5, rounds),
        ratio("one seed against its best", one / best, 3.5, rounds),
        ratio(
            "several seeds together against its best",
            rates[f"ours, {cores} seeds side by side"] / best,
            4.5,
            rounds,
        ),
    ]
    return lines


def reach(rounds: int) -> list[str]:
    """Seconds of training (evaluation not counted) until 99.0 % test accuracy."""
    cores = core_count()
    give_up = ["--target", str(TARGET), "--epochs", "6"]
    seeds = iter(range(10_000))
    sides: dict[str, Callable[[], Answer]] = {}
    for epochs, batch in ((1, 64), (1, 128), (2, 128)):
        values = {"epochs": epochs, "batch_size": batch}
        name = f"ours, {epochs} epoch{'s' * (epochs > 1)} of batches of {batch}"
        sides[name] = lambda values=values: ours(values, next(seeds), cores)  # type: ignore[misc]
    for optimizer in ("adadelta", "adam-0.001", "adam-0.01"):
        options = ["--optimizer", optimizer, *give_up]
        sides[f"usual, {optimizer}"] = lambda options=options: usual(  # type: ignore[misc]
            cores, 0, "--seed", str(next(seeds)), *options
        )
    found = interleaved(sides, rounds)
    lines, times = [], {}
    for name, answers in found.items():
        last = [answer.get("accuracy") or answer["accuracies"][-1] for answer in answers]
        reached = sum(each >= TARGET for each in last)
        seconds = median(answers, "seconds")
        lines.append(
            f"{name}: {seconds:.1f} s, {reached} of {rounds} reached {TARGET:.1%} "
            f"(accuracy {min(last):.2%} to {max(last):.2%})"
        )
        if reached > rounds / 2:
            times[name] = seconds
    theirs = min(
        (seconds for name, seconds in times.items() if name.startswith("usual")), default=float("nan")
    )
    mine = min((seconds for name, seconds in times.items() if name.startswith("ours")), default=float("nan"))
    lines.append(ratio("time to 99.0 %, theirs over ours", theirs / mine, 15, rounds))
    return lines


def determinism(rounds: int) -> list[str]:
    """Whether runs with the same seed end in the same weights."""
    found = interleaved({"ours": lambda: ours({"epochs": 1})}, max(2, rounds))["ours"]
    digests = {answer["sha256"] for answer in found}
    return [
        f"sha256 of the weights over {len(found)} runs: {len(digests)} different ({', '.join(d[:16] for d in digests)})",
        "no operator was exchanged for a deterministic one and no switch is set, so there is nothing to pay",
    ]


def timed(command: list[str]) -> float:
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed:\n{done.stderr}")
    return time.perf_counter() - begun


def overhead(rounds: int) -> list[str]:
    """What DVC and the stages add: to nothing to do, and to the bare training of `make run`."""
    subprocess.run(["dvc", "repro", "--quiet"], check=True)
    found = interleaved(
        {
            "dvc status": lambda: {"seconds": timed(["dvc", "status"])},
            "dvc repro": lambda: {"seconds": timed(["dvc", "repro"])},
        },
        max(5, rounds),
    )
    status, repro = median(found["dvc status"], "seconds"), median(found["dvc repro"], "seconds")
    whole = timed(["dvc", "repro", "--force"])
    bare = json.loads((files.COST / "train.json").read_text())["fit_seconds"]
    return [
        f"dvc status {status:.2f} s, dvc repro with nothing to do {repro:.2f} s",
        ratio(
            "dvc repro with nothing to do over dvc status", repro / status, 1.5, max(5, rounds), at_most=True
        ),
        f"make run from nothing {whole:.1f} s, of which the seeds' training {bare:.1f} s",
        ratio("make run over bare training", whole / bare, 1.25, 1, at_most=True),
    ]


PARTS = {"speed": speed, "reach": reach, "determinism": determinism, "overhead": overhead}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}")
    if not files.DATA.is_dir():
        raise UserError("data/ is missing: the benchmarks train on MNIST. Run `make data`.")
    for name in arguments.parts or PARTS:
        print(
            f"{name} ({platform.processor() or platform.machine()}, {core_count()} cores)",
            flush=True,
        )
        lines = PARTS[name](arguments.rounds)
        print("\n".join(f"  {line}" for line in lines), flush=True)
        files.write_json(RESULTS / f"{name}.json", {"rounds": arguments.rounds, "lines": lines})


if __name__ == "__main__":
    exit_on_user_error(main)
