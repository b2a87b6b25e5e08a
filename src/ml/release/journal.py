"""What a release did, step by step: printed as it happens, and kept in reports/release.json."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ml import files

JOURNAL = files.REPORTS / "release.json"


@dataclass
class Journal:
    """`facts` are of the whole release; `warnings` what it could not do, each with the remedy."""

    path: Path = JOURNAL
    steps: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time what is done inside. The journal is written after each step, failed or not."""
        entry: dict[str, Any] = {"step": name, "said": []}
        self.steps.append(entry)
        started = time.monotonic()
        print(f"── {name}", flush=True)
        outcome = "failed"
        try:
            yield
            outcome = "done"
        finally:
            entry |= {"outcome": outcome, "seconds": round(time.monotonic() - started, 2)}
            content = {"facts": self.facts, "warnings": self.warnings, "steps": self.steps}
            files.write_json(self.path, content)

    def say(self, text: str) -> None:
        self.steps[-1]["said"].append(text)
        print(f"   {text}", flush=True)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        print(f"   warning: {text}", file=sys.stderr, flush=True)
