"""The loop that most people run on MNIST: torchvision's dataset, ToTensor + Normalize, a DataLoader, batches of 64.

After PyTorch's MNIST example, with the network of this project in its plain order (convolution, ReLU, pooling).
Prints one JSON line.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ml import files
from ml.task.dataset import RAW_FILES
from ml.task.torchvision_import import import_torchvision

OPTIMIZERS = {
    "adam-0.01": lambda weights: torch.optim.Adam(weights, lr=0.01),
    "adam-0.001": lambda weights: torch.optim.Adam(weights, lr=0.001),
    "adadelta": lambda weights: torch.optim.Adadelta(weights, lr=1.0),
}
GAMMA = 0.7  # the example's StepLR, with its Adadelta
WARM_UP = 10  # steps


class PlainCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.linear = nn.Linear(32 * 7 * 7, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return F.log_softmax(self.linear(x.flatten(1)), dim=1)


def loaders(
    workers: int, device: torch.device
) -> tuple[torch.utils.data.DataLoader, torch.utils.data.DataLoader]:
    import_torchvision()
    from torchvision import datasets, transforms

    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for name in RAW_FILES:
            shutil.copyfile(files.DATA / name, raw / name)
        train, test = (datasets.MNIST(folder, train=part, transform=transform) for part in (True, False))
    pin = device.type == "cuda"
    return (
        torch.utils.data.DataLoader(train, batch_size=64, shuffle=True, num_workers=workers, pin_memory=pin),
        torch.utils.data.DataLoader(test, batch_size=1000, num_workers=workers, pin_memory=pin),
    )


def test_accuracy(model: nn.Module, loader: torch.utils.data.DataLoader, device: torch.device) -> float:
    model.eval()
    with torch.no_grad():
        right = sum(int((model(x.to(device)).argmax(1) == y.to(device)).sum()) for x, y in loader)
    model.train()
    return right / len(loader.dataset)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adam-0.001")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="stop after so many steps and print samples/s")
    parser.add_argument(
        "--target", type=float, help="train until this test accuracy; evaluation is not in the time"
    )
    parser.add_argument("--epochs", type=int, default=1, help="give up on the target after so many")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, test = loaders(arguments.workers, device)
    model = PlainCNN().to(device)
    optimizer = OPTIMIZERS[arguments.optimizer](model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(
        optimizer, 1, GAMMA if arguments.optimizer == "adadelta" else 1.0
    )

    seconds, samples, accuracies = 0.0, 0, []
    for _ in range(arguments.epochs):
        start = time.perf_counter()
        for step, (images, labels) in enumerate(train):
            if arguments.steps and step == WARM_UP:
                start, samples = time.perf_counter(), 0
            optimizer.zero_grad()
            loss = F.nll_loss(model(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            samples += len(labels)
            if arguments.steps and step == WARM_UP + arguments.steps:
                break
        loss.item()  # on a GPU: wait for what is still under way
        seconds += time.perf_counter() - start
        schedule.step()
        if not arguments.steps:
            accuracies.append(test_accuracy(model, test, device))
            if arguments.target and accuracies[-1] >= arguments.target:
                break
    reached = bool(arguments.target and accuracies and accuracies[-1] >= arguments.target)
    print(
        json.dumps(
            {
                "samples_per_s": samples / seconds,
                "seconds": seconds,
                "accuracies": accuracies,
                "reached": reached,
            }
        )
    )


if __name__ == "__main__":
    main()
