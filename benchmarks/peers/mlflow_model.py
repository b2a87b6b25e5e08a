"""Save the network as an MLflow model for `mlflow models serve`: `python mlflow_model.py FOLDER`."""

import sys

import mlflow
import numpy as np
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec
from model import load

from ml import files

summary = files.read_json(files.DATA_SUMMARY, "load")
shape = (-1, summary["image_height"], summary["image_width"])
network = load()
signature = ModelSignature(
    inputs=Schema([TensorSpec(np.dtype(np.uint8), shape)]),
    outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, len(summary["class_names"])))]),
)
mlflow.pytorch.save_model(
    network, sys.argv[1], signature=signature, pip_requirements=["torch"], serialization_format="pickle"
)
