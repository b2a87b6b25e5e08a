"""Try one model in a process of its own: `python -m ml.serve.trial FOLDER`. Exit 1 with the check that it failed."""

import resource
import sys
from contextlib import suppress
from pathlib import Path

from ml.bundle import EXPERIMENT, EXPERIMENT_LIMIT, parse_experiment
from ml.errors import UserError
from ml.serve.model import Bundle, Refused, load, read_plain

MEMORY = 2 * 2**30  # bytes that it may write to
SECONDS = 60  # of processor time


def main() -> None:
    folder = Path(sys.argv[1])
    with suppress(ValueError, OSError):  # a lower limit is in force already
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        load(Bundle(folder, parse_experiment(read_plain(folder / EXPERIMENT, EXPERIMENT_LIMIT), EXPERIMENT)))
    except Refused as error:
        print(f"\n{error.check} {' '.join(str(error).split())}")
        sys.exit(1)
    except UserError as error:
        print(f"\nfiles {' '.join(str(error).split())}")
        sys.exit(1)


if __name__ == "__main__":
    main()
