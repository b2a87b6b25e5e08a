"""Fit MiniCNN in float64 on random images, alone or under torchrun: `python -m tests.fit_in_float64 OUT.npz`."""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ml.fit import Resident, fit
from ml.params import load_params
from ml.parallel import under_torchrun
from ml.task.model import MiniCNN, conv_pool_relu


class DoubleCNN(MiniCNN):
    def forward(self, images: Tensor) -> Tensor:
        x = ((images.double() - self.mean * 255) / (self.std * 255)).unsqueeze(1)
        x = conv_pool_relu(self.conv2, conv_pool_relu(self.conv1, x))
        return F.log_softmax(self.linear(x.flatten(1)), dim=1)


def main() -> None:
    torch.set_num_threads(1)
    if under_torchrun():
        dist.init_process_group("gloo")
    random = np.random.RandomState(0)
    labels = random.randint(0, 3, 200)
    images = (random.randint(0, 200, (200, 12, 12)) + 25 * labels[:, None, None]).astype(np.uint8)
    examples = Resident.from_arrays(images, labels.astype(np.int64))
    torch.manual_seed(0)
    model = DoubleCNN(12, 3, (4, 8), 0.5, 0.3).double()
    shape = {"epochs": 4, "batch_size": 20, "learning_rate": 0.01, "log_every": 1, "precision": "float32"}
    params = load_params().train.model_copy(update=shape)
    fitted = fit(model, examples, examples, params, seed=0, device=torch.device("cpu"))
    if not under_torchrun() or dist.get_rank() == 0:
        losses = np.array([point.loss for point in fitted.history.train])
        np.savez(
            Path(sys.argv[1]), losses=losses, **{name: value.numpy() for name, value in fitted.state.items()}
        )
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
