"""A small pipeline for the tests of remotes, locks and receipts: real git, real DVC, stages of a few lines of Python."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

IDENTITY = {
    "GIT_AUTHOR_NAME": "test",
    "GIT_AUTHOR_EMAIL": "test@localhost",
    "GIT_COMMITTER_NAME": "test",
    "GIT_COMMITTER_EMAIL": "test@localhost",
    "GIT_CONFIG_GLOBAL": os.devnull,
}
PARAMS: dict[str, Any] = {
    "load": {"copies": 3},
    "train": {"epochs": 2, "rate": 0.1},
    "evaluate": {"digits": 4},
}
CODE = {
    "load": """
rows = "".join(open(f"data/{name}").read() for name in sorted(os.listdir("data")))
os.makedirs("artifacts/parts", exist_ok=True)
open("artifacts/train.txt", "w").write(rows * params["copies"])
for number in range(4):
    open(f"artifacts/parts/{number}.txt", "w").write(rows + str(number))
""",
    "train": """
rows = open("artifacts/train.txt").read()
os.makedirs("reports", exist_ok=True)
os.makedirs("artifacts", exist_ok=True)
open("artifacts/model.onnx", "w").write(f"model of {len(rows)} {params}" * 50)
open("reports/validation.json", "w").write('{"loss": %s}' % params["rate"])
""",
    "evaluate": """
model = open("artifacts/model.onnx").read()
parts = "".join(open(f"artifacts/parts/{name}").read() for name in sorted(os.listdir("artifacts/parts")))
os.makedirs("reports", exist_ok=True)
open("reports/metrics.json", "w").write('{"accuracy": %s}' % round(len(model) / (len(model) + len(parts)), params["digits"]))
""",
}
HEAD = """import os, sys
from ruamel.yaml import YAML
params = YAML(typ="safe").load(open("params.yaml"))["{name}"]
print("{name} at work")
"""
STAGES = {
    "load": (["data"], ["artifacts/train.txt", "artifacts/parts"]),
    "train": (["artifacts/train.txt"], ["artifacts/model.onnx", "reports/validation.json"]),
    "evaluate": (["artifacts/model.onnx", "artifacts/parts"], ["reports/metrics.json"]),
}
OUTPUTS = ("artifacts", "reports/validation.json", "reports/metrics.json")


@dataclass
class Project:
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)  # what CI would set

    def run(self, *command: str, fails: bool = False, **more: str) -> str:
        """What it printed; the exit code is checked."""
        done = self.call(*command, **more)
        output = done.stdout + done.stderr
        assert (done.returncode != 0) == fails, output
        return output

    def call(self, *command: str, **more: str) -> "subprocess.CompletedProcess[str]":
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("CI", "GITLAB", "DVC", "AWS"))
        }
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        more = IDENTITY | {"PATH": path, "DVC_NO_ANALYTICS": "1"} | self.environment | more
        return subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, env=inherited | more, timeout=300
        )

    def ml(self, module: str, *arguments: str, fails: bool = False, **more: str) -> str:
        return self.run(sys.executable, "-m", f"ml.release.{module}", *arguments, fails=fails, **more)

    def git(self, *arguments: str) -> str:
        return self.run("git", *arguments).strip()

    def commit(self, message: str = "change") -> str:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", message)
        return self.git("rev-parse", "HEAD")

    def set_param(self, name: str, value: Any) -> None:
        section, key = name.split(".")
        params = YAML(typ="safe").load((self.folder / "params.yaml").read_text())
        params[section][key] = value
        with open(self.folder / "params.yaml", "w") as file:
            YAML().dump(params, file)

    def edit_code(self, stage: str, text: str = "# edited\n") -> None:
        with open(self.folder / f"src/{stage}.py", "a") as file:
            file.write(text)

    @property
    def lock(self) -> str:
        return (self.folder / "dvc.lock").read_text()

    def clone(self, folder: Path, **environment: str) -> "Project":
        """As a job gets it: nothing but what is committed."""
        self.run("git", "clone", "--quiet", str(self.folder), str(folder))
        return Project(folder, self.environment | environment)


def make_project(folder: Path, **environment: str) -> Project:
    """Code, params and data are committed; nothing has run."""
    folder.mkdir(parents=True)
    project = Project(folder, environment)
    project.git("init", "--quiet", "--initial-branch=main")
    project.run("dvc", "init", "--quiet")
    (folder / "src").mkdir()
    for name, code in CODE.items():
        (folder / f"src/{name}.py").write_text(HEAD.format(name=name) + code)
    with open(folder / "params.yaml", "w") as file:
        YAML().dump(PARAMS, file)
    stages = {
        name: {
            "cmd": f"python src/{name}.py",
            "deps": [f"src/{name}.py", *deps],
            "params": [name],
            "outs": outs,
        }
        for name, (deps, outs) in STAGES.items()
    }
    with open(folder / "dvc.yaml", "w") as file:
        YAML().dump({"stages": stages}, file)
    (folder / "data").mkdir()
    for number in range(3):
        (folder / f"data/{number}.txt").write_text(f"row {number}\n" * 40)
    (folder / ".gitignore").write_text("/artifacts/\n/reports/\n")
    project.run("dvc", "add", "--quiet", "data")
    project.commit("project")
    return project


def executed(output: str) -> list[str]:
    """The stages that really ran, by what they print."""
    return [name for name in STAGES if f"{name} at work" in output]
