"""The network of the last run, as each peer uses it: in torch, on one thread. Run in the folder of the run."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ml import files
from ml.params import load_params
from ml.task.model import build_model


class Network(nn.Module):
    """(batch, H, W) uint8 → (batch, classes) probabilities, as model.onnx."""

    def __init__(self) -> None:
        super().__init__()
        summary, split = files.read_json(files.DATA_SUMMARY, "load"), files.load_split()
        shape = (summary["image_height"], summary["image_width"])
        self.network = build_model(
            load_params().model, shape, len(summary["class_names"]), split.mean, split.std
        )
        weights = files.load_weights(files.MODEL_WEIGHTS)
        self.network.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})

    def forward(self, images: Tensor) -> Tensor:
        probabilities: Tensor = self.network(images).exp()
        return probabilities


def load() -> Network:
    torch.set_num_threads(1)  # each server has one core
    return Network().eval()


def predict(network: Network, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    with torch.inference_mode():
        return network(torch.from_numpy(images)).numpy()


def answer(probabilities: NDArray[np.float32]) -> dict[str, object]:
    """What a client is told of one image: the class and the probability of each."""
    named = {str(index): value for index, value in enumerate(probabilities.tolist())}
    return {"class": max(named, key=named.__getitem__), "probabilities": named}
