"""Run a linter, show what it says, and write its findings as GitLab shows them beside the changed lines.

    python .ci/code_quality.py gl-code-quality-report.json make --keep-going lint

Exit code: the linter's. Format: docs.gitlab.com/ci/testing/code_quality (a part of Code Climate's).
"""

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

# path:line[:column]: message, as mypy and pyflakes write it; black names a file only.
FINDING = re.compile(r"^(?P<path>[^\s:]+\.pyi?):(?P<line>\d+):(?:\d+:)? (?P<message>.+)$")
UNFORMATTED = re.compile(r"^(?P<message>would reformat) (?P<path>.+\.pyi?)$")
# import-linter: `- ml.report.x -> ml.stages.y (l.12)`
IMPORT = re.compile(r"^- +(?P<message>ml(?P<module>[\w.]*) -> \S+) \(l\.(?P<line>\d+)")


class Lines(TypedDict):
    begin: int


class Location(TypedDict):
    path: str
    lines: Lines


class Finding(TypedDict):
    description: str
    check_name: str
    fingerprint: str
    severity: str
    location: Location


def findings(lines: list[str], root: Path) -> Iterator[Finding]:
    """One for each line that names a place in the code; notes of mypy are no findings."""
    seen: dict[str, int] = {}
    for line in lines:
        found = FINDING.match(line) or UNFORMATTED.match(line) or IMPORT.match(line)
        if found is None or ": note: " in line:
            continue
        groups = found.groupdict()
        path = groups.get("path") or source_of(groups["module"], root)
        if Path(path).is_absolute():
            path = str(Path(path).relative_to(root)) if Path(path).is_relative_to(root) else path
        tool = "black" if "reformat" in line else "imports" if "module" in groups else "types and names"
        message = "is not formatted; run black" if tool == "black" else groups["message"]
        # Without the line number: a finding that only moved is the same one.
        key = f"{path}:{message}"
        seen[key] = seen.get(key, 0) + 1
        yield {
            "description": message,
            "check_name": tool,
            "fingerprint": hashlib.sha256(f"{key}:{seen[key]}".encode()).hexdigest(),
            "severity": "minor" if tool == "black" else "major",
            "location": {"path": path, "lines": {"begin": int(groups.get("line") or 1)}},
        }


def source_of(module: str, root: Path) -> str:
    """src/ml/a/b.py, or src/ml/a/b/__init__.py, of the module `.a.b`."""
    stem = Path("src/ml", *module.strip(".").split("."))
    return str(stem / "__init__.py") if (root / stem).is_dir() else f"{stem}.py"


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit("usage: code_quality.py REPORT COMMAND [ARGUMENT...]")
    report, command = Path(sys.argv[1]), sys.argv[2:]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip("\n"))
    found = list(findings(lines, Path.cwd()))
    report.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{len(found)} findings → {report}")
    sys.exit(process.returncode)


if __name__ == "__main__":
    main()
