"""The network of the task. ★ A team replaces this module; `build_model` is all that the stages call.

A model takes raw images, so that training, ONNX and serving share one preprocessing: (B, H, W) uint8 in 0..255
to (B, classes) log-probabilities.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ml.errors import UserError
from ml.params import ModelParams


class MiniCNN(nn.Module):
    """conv 3×3 → ReLU → max-pool 2, twice, then a linear layer and log-softmax.

    Args:
        image_size: height and width in pixels, a multiple of 4.
        mean, std: of the training pixels, on the scale 0..1.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, image_size: int, classes: int, channels: tuple[int, int], mean: float, std: float
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))
        self.conv1 = nn.Conv2d(1, channels[0], kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(channels[0], channels[1], kernel_size=3, padding=1)
        self.linear = nn.Linear(channels[1] * (image_size // 4) ** 2, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = preprocess(images, self.mean, self.std)  # (B, 1, 28, 28)
        x = conv_pool_relu(self.conv1, x)  # (B, 16, 14, 14)
        x = conv_pool_relu(self.conv2, x)  # (B, 32, 7, 7)
        return F.log_softmax(self.linear(x.flatten(1)).float(), dim=1)  # (B, 10)


def preprocess(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalise (B, H, W) uint8 in 0..255 to (B, 1, H, W) float32 with the training pixels' mean 0 and deviation 1."""
    return ((images.float() - mean * 255) / (std * 255)).unsqueeze(1)


def conv_pool_relu(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """max_pool(relu(conv(x))), in the order that is cheapest to train.

    A maximum commutes with adding a bias per channel and with ReLU, so both can wait until pooling has left a
    quarter of the values; and the bias gradient is then a plain sum instead of a slow path of the convolution's.
    """
    assert conv.bias is not None
    x = F.max_pool2d(F.conv2d(x, conv.weight, padding=conv.padding), 2)
    return F.relu(x + conv.bias[:, None, None])


def build_model(
    params: ModelParams, image_shape: tuple[int, int], classes: int, mean: float, std: float
) -> MiniCNN:
    """The untrained network for images of `image_shape` pixels, initialised from torch's global random state.

    Raises:
        UserError: the images are not squares with a side that is a multiple of 4.
    """
    height, width = image_shape
    if height != width or height % 4 or not height:
        raise UserError(
            f"MiniCNN takes square images with a side that is a multiple of 4, such as 28×28; these are "
            f"{height}×{width}.\nResize them in src/ml/task/dataset.py, or change the network in src/ml/task/model.py."
        )
    first, second = params.channels
    return MiniCNN(height, classes, (first, second), mean, std)
