"""The model of the task: scikit-learn's linear support vector machine, kept as a torch module.

libsvm finds the planes between each two species; as tensors they travel the template's own way: safetensors, ONNX,
evaluation, serving. No pickle.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ml.errors import UserError
from ml.params import ModelParams

CALIBRATION_C = 1.0  # without a penalty the calibration would follow single flowers


class LinearSVM(nn.Module):
    """Distances to the planes between each two classes (one against one), then calibrated log-probabilities.

    Args:
        features: how many numbers an example has.
        mean, std: of the training examples' numbers, on the scale 0..1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, params: ModelParams, features: int, classes: int, mean: float, std: float) -> None:
        super().__init__()
        self.params = params
        pairs = classes * (classes - 1) // 2
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))
        self.planes = nn.Linear(features, pairs)
        self.calibration = nn.Linear(pairs, classes)
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        x = (images.float().flatten(1) / 255 - self.mean) / self.std  # (B, 4)
        return F.log_softmax(self.calibration(self.planes(x)), dim=1)  # (B, 3)

    def fit_examples(self, images: NDArray[np.uint8], labels: NDArray[np.int64], seed: int) -> None:
        """Find the planes on all examples; calibrate on distances that cross-validation, split by `seed`, gives.

        Raises:
            UserError: a class has fewer examples than there are folds.
        """
        fewest, folds = int(np.bincount(labels).min()), self.params.calibration_folds
        if fewest < folds:
            raise UserError(
                f"model.calibration_folds is {folds}, but a class has {fewest} training examples. "
                f"Set it in params.yaml to {fewest} or less."
            )
        # Needed to fit, not to predict: whoever loads the model needs only torch.
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
        from sklearn.svm import SVC

        machine = SVC(C=self.params.penalty, kernel="linear", decision_function_shape="ovo")
        x = (images.reshape(len(images), -1) / 255 - self.mean.item()) / self.std.item()
        split = StratifiedKFold(folds, shuffle=True, random_state=seed)
        distances = cross_val_predict(machine, x, labels, cv=split, method="decision_function")
        calibration = LogisticRegression(C=CALIBRATION_C, max_iter=10_000).fit(
            distances.reshape(len(labels), -1), labels
        )
        machine.fit(x, labels)
        put(self.planes, machine.coef_, machine.intercept_)
        put(self.calibration, *for_each_class(calibration.coef_, calibration.intercept_))


def for_each_class(weight: NDArray[np.float64], bias: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Of two classes scikit-learn keeps the second one's row alone; the first one's is 0."""
    if len(bias) > 1:
        return weight, bias
    return np.vstack([np.zeros_like(weight), weight]), np.concatenate([np.zeros_like(bias), bias])


def put(layer: nn.Linear, weight: NDArray[np.float64], bias: NDArray[np.float64]) -> None:
    layer.weight.copy_(torch.tensor(weight))
    layer.bias.copy_(torch.tensor(bias))


def build_model(
    params: ModelParams, image_shape: tuple[int, int], classes: int, mean: float, std: float
) -> LinearSVM:
    """The unfitted machine for examples of `image_shape` (1, features)."""
    return LinearSVM(params, image_shape[0] * image_shape[1], classes, mean, std)
