"""Complete the bill of materials of the serving image: `python sbom.py python.json MODEL_FOLDER > sbom.cdx.json`.

cyclonedx-py lists the Python packages; this adds what dpkg knows of the base image, and the model with its sha256.
The same image gives the same bytes.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def debian_packages() -> list[dict[str, Any]]:
    release = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line
    )
    distribution = release["ID"].strip('"')
    lines = subprocess.run(
        ["dpkg-query", "--show", "--showformat", "${Package}\\t${Version}\\t${Architecture}\\n"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    found = []
    for name, version, architecture in sorted(line.split("\t") for line in lines):
        purl = f"pkg:deb/{distribution}/{name}@{version.replace('+', '%2B')}?arch={architecture}"
        found.append({"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl})
    return found


def model(experiment: dict[str, Any]) -> dict[str, Any]:
    named = ("git_commit", "dataset", "data_hash", "lock_sha256")
    return {
        "type": "machine-learning-model",
        "bom-ref": f"model:{experiment['tag']}",
        "name": "model.onnx",
        "version": experiment["tag"],
        "hashes": [{"alg": "SHA-256", "content": experiment["model"]["sha256"]}],
        "properties": [{"name": f"ml:{name}", "value": str(experiment[name])} for name in named],
    }


bom = json.loads(Path(sys.argv[1]).read_text())
experiment = json.loads((Path(sys.argv[2]) / "experiment.json").read_text())
bom["metadata"]["component"] = {
    "type": "container",
    "bom-ref": "image",
    "name": "ml-serve",
    "version": experiment["tag"],
}
bom["components"] += [*debian_packages(), model(experiment)]
json.dump(bom, sys.stdout, indent=1, sort_keys=True)
