"""Train several seeds: side by side, one process each, or one after the other over the processes of torchrun."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from queue import Empty
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ml.errors import UserError
from ml.fit import Fitted, Progress
from ml.params import TrainParams
from ml.progress import progress

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

    from tqdm import tqdm

Report = Callable[[Progress], None]
FitSeed = Callable[[int, torch.device, Report], Fitted]
OnProgress = Callable[[int, Progress], None]  # seed, how far it is

# glibc gives freed memory back to the kernel and takes it again page by page, every step; keeping it, in huge pages,
# saves a quarter of a training on a CPU. It is read when a process starts, so it is set before the workers do. Other C
# libraries ignore it.
KEEP_FREED_MEMORY = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432:"
    "glibc.malloc.trim_threshold=2147483647:glibc.malloc.top_pad=268435456"
)


def ignore(seed: int, so_far: Progress) -> None:
    pass


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def choose_device(params: TrainParams, index: int = 0) -> torch.device:
    """The device of worker `index`. Raises UserError when CUDA is asked for and there is none."""
    if params.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"train.device in params.yaml is cuda, but torch {torch.__version__} finds no CUDA device here.\n"
            "Set it to auto or cpu, or run on a machine with a GPU, its driver and a CUDA build of torch."
        )
    if params.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cudnn.deterministic = True  # else its heuristics may choose a sum in any order
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32
    return torch.device("cuda", index % torch.cuda.device_count())


def worker_count(params: TrainParams, wanted: int | None) -> int:
    """How many seeds to train at a time: `wanted`, or one per GPU, or as many as the CPUs have threads for."""
    if choose_device(params).type == "cuda":
        places = torch.cuda.device_count()
    else:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        places = max(1, cpus // params.threads)
    return min(wanted or places, len(params.seeds))


def fit_side_by_side(
    fit_seed: FitSeed, params: TrainParams, workers: int, samples: int, on_progress: OnProgress = ignore
) -> list[Fitted]:
    """Fit every seed in a process of its own, `workers` at a time. The first failure stops them all.

    Args:
        fit_seed: a picklable function.
        samples: how many examples one seed sees, for the progress bar.
        on_progress: called in this process, which does not train, with each seed's reports.
    """
    os.environ.setdefault("GLIBC_TUNABLES", KEEP_FREED_MEMORY)
    context = multiprocessing.get_context("spawn")
    messages: "Queue[tuple[int, Progress]]" = context.Queue()
    setup = (messages, context.Value("i", 0), params)
    with (
        progress("train", len(params.seeds) * samples, "sample") as bar,
        ProcessPoolExecutor(workers, context, start_worker, setup) as pool,
    ):
        futures = [pool.submit(work, fit_seed, seed) for seed in params.seeds]
        try:
            watch(futures, messages, bar, on_progress)
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise UserError(
                "a training process was killed from outside, perhaps for want of memory, or could not start (then its "
                "own message is above).\nRun the same command again: it goes on from the last checkpoint. "
                "TRAIN_PROCESSES=1 trains one seed at a time."
            ) from None
        finally:  # after a failure or Ctrl-C: leave no process behind
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()


def watch(
    futures: "list[Future[Fitted]]",
    messages: "Queue[tuple[int, Progress]]",
    bar: "tqdm[Any]",
    on_progress: OnProgress,
) -> None:
    """Show the workers' messages until every seed is done or one has failed."""
    seen: dict[int, int] = {}
    while not all(future.done() for future in futures) or not messages.empty():
        for future in futures:
            if future.done():
                future.result()  # raises what the worker raised
        try:
            seed, so_far = messages.get(timeout=0.2)
        except Empty:
            continue
        on_progress(seed, so_far)
        show(bar, seed, so_far, so_far.samples - seen.get(seed, 0))
        seen[seed] = so_far.samples


def show(bar: "tqdm[Any]", seed: int, so_far: Progress, more_samples: int) -> None:
    shown = {"seed": str(seed), "loss": f"{so_far.loss:.4f}"}
    if so_far.validation_accuracy is not None:
        shown["validation"] = f"{so_far.validation_accuracy:.2%}"
    bar.set_postfix(shown, refresh=False)
    bar.update(more_samples)


class Worker:
    """What a worker process knows of itself. Set once, by `start_worker`."""

    messages: "Queue[tuple[int, Progress]]"
    device: torch.device


def start_worker(messages: "Queue[tuple[int, Progress]]", counter: Any, params: TrainParams) -> None:
    """In a new worker: take a device, leave Ctrl-C to the parent, and end when the parent ends, however it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with counter.get_lock():
        index = counter.value
        counter.value += 1
    Worker.messages, Worker.device = messages, choose_device(params, index)
    torch.set_num_threads(params.threads)
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def end_with_parent() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def work(fit_seed: FitSeed, seed: int) -> Fitted:
    return fit_seed(seed, Worker.device, lambda so_far: Worker.messages.put((seed, so_far)))


def fit_over_processes(
    fit_seed: FitSeed, params: TrainParams, samples: int, on_progress: OnProgress = ignore
) -> list[Fitted]:
    """Under torchrun: fit one seed after the other, each over all processes."""
    device = choose_device(params, int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(params.threads)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    fitted = []
    with progress("train", len(params.seeds) * samples, "sample", disable=dist.get_rank() > 0) as bar:
        for number, seed in enumerate(params.seeds):

            def report(so_far: Progress, seed: int = seed, before: int = number * samples) -> None:
                on_progress(seed, so_far)
                show(bar, seed, so_far, before + so_far.samples - int(bar.n))

            fitted.append(fit_seed(seed, device, report))
    return fitted
