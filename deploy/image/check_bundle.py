"""Refuse to bake a bundle that is not what the image's labels say: run by the build with the arguments as environment.

MODEL_TAG, MODEL_SHA256 and DATA_HASH must agree with the bundle's experiment.json, and the files with the sha256 in
it. REVISION is the commit of this image's code: later than the model's where an old model is built into a new image.
"""

import os
import re
import sys
from pathlib import Path

from ml import bundle, files

tag, folder = os.environ["MODEL_TAG"], Path(sys.argv[1])
if not tag:
    sys.exit("MODEL_TAG is missing: pass --build-arg MODEL_TAG=…, the name of a folder in models/.")
path = folder / tag / bundle.EXPERIMENT
experiment = bundle.parse_experiment(files.read_bytes(path, "train"), str(path))
problems = [
    f"{name} is {os.environ[name] or 'missing'}, and the bundle says {expected}"
    for name, expected in (
        ("MODEL_TAG", experiment.tag),
        ("MODEL_SHA256", experiment.model.sha256),
        ("DATA_HASH", experiment.data_hash),
    )
    if os.environ[name] != expected
]
if not re.fullmatch("[0-9a-f]{40,64}", os.environ["REVISION"]):
    problems.append("REVISION must be a full commit hash, such as $CI_COMMIT_SHA")
for name, file in ((bundle.MODEL, experiment.model), (bundle.GOLDEN, experiment.golden)):
    if (found := files.sha256(folder / tag / name)) != file.sha256:
        problems.append(f"{name} has the sha256 {found}, and experiment.json says {file.sha256}")
if problems:
    sys.exit("The image is not built; mend the build arguments or the bundle:\n  " + "\n  ".join(problems))
