"""Export a model to ONNX: raw uint8 images in, probabilities out, any batch size, the same bytes every time."""

import io
import warnings
from contextlib import redirect_stdout

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import ExportedProgram

from ml.errors import UserError
from ml.files import Golden
from ml.fit import predict

PARITY = 1e-4  # largest difference of a probability between torch and ONNX Runtime
PARITY_BATCHES = (1, 3, 64)  # different sizes, so that a batch size frozen into the graph is found


class Probabilities(nn.Module):
    """exp of the model's log-probabilities: what a client of the served model wants."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        probabilities: Tensor = self.model(images).exp()
        return probabilities


def export_program(model: nn.Module, sample: NDArray[np.uint8]) -> ExportedProgram:
    """`model` as torch's own graph: images (batch, H, W) uint8 to probabilities (batch, classes) float32.

    Args:
        sample: (N, H, W) images, of which the graph keeps two.
    """
    program = torch.export.export(
        Probabilities(model.cpu()).eval(),
        (torch.from_numpy(sample[:2]),),
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
    )
    for node in program.graph_module.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of the machine
    return program


def export_onnx(exported: ExportedProgram, model: nn.Module, sample: NDArray[np.uint8]) -> bytes:
    """The graph as an ONNX file: input `images` (batch, H, W) uint8, output `probabilities` (batch, classes) float32.

    Args:
        exported: `export_program` of `model`.
        sample: (N, H, W) real images, on which ONNX Runtime must agree with torch within `PARITY`.

    Raises:
        UserError: the two disagree.
    """
    model = model.cpu().eval()
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        # torch's own exporter calls a function that torch has deprecated.
        warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated", FutureWarning)
        program = torch.onnx.export(
            exported,
            dynamo=True,
            input_names=["images"],
            output_names=["probabilities"],
            external_data=False,
            verbose=False,
        )
    assert program is not None
    content = without_paths(program.model_proto)
    check_parity(content, model, sample)
    return content


def golden(model: nn.Module, images: NDArray[np.uint8]) -> Golden:
    """What torch says of `images` (N, H, W): whoever loads the exported model checks it against this."""
    return Golden(images, predict(model.cpu(), torch.from_numpy(images)).exp().numpy())


def without_paths(model: onnx.ModelProto) -> bytes:
    """Serialise without the exporter's notes: they quote source lines with their paths, which differ by machine."""
    graph = model.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def check_parity(content: bytes, model: nn.Module, sample: NDArray[np.uint8]) -> None:
    """Raises UserError when ONNX Runtime and torch give a probability that differs by more than `PARITY`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    for size in PARITY_BATCHES:
        images = sample[np.arange(size) % len(sample)]
        (served,) = session.run(None, {"images": images})
        expected = predict(model, torch.from_numpy(images)).exp().numpy()
        difference = float(np.abs(served - expected).max())
        if not difference <= PARITY:
            raise UserError(
                f"the ONNX export differs from torch by {difference:.2e} in a probability (allowed: {PARITY:.0e}, "
                f"batch of {size}). An operator of the model in src/ml/task/model.py is exported inexactly: replace it."
            )
