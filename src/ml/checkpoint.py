"""Checkpoints of a training under way: model, optimizer, place and curve, as safetensors (no pickle), written atomically."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from ml import files


@dataclass(frozen=True)
class Checkpoint:
    step: int  # steps done
    model: dict[str, Tensor]
    optimizer: dict[int, dict[str, Tensor]]
    best: dict[str, Tensor]  # weights of the best epoch so far; empty before the first
    random: dict[str, Tensor]  # states of torch's own generators, for a model that draws from them (dropout)
    losses: Tensor  # (k,) of the steps since the last point of the curve
    history: dict[str, list[dict[str, Any]]]  # as ml.fit.History

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model.load_state_dict(self.model)
        # A fused optimizer walks through the memory of weights and moments alike, so both need one layout
        # (channels_last, say), which load_state_dict does not see to.
        parameters = list(model.parameters())
        for index, state in self.optimizer.items():  # by number: the file has them by name, 10 before 2
            for name, value in state.items():
                if value.shape == parameters[index].shape:
                    state[name] = torch.empty_like(parameters[index]).copy_(value)
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": self.optimizer, "param_groups": groups})
        torch.set_rng_state(self.random["cpu"])
        if "cuda" in self.random:
            torch.cuda.set_rng_state(self.random["cuda"], parameters[0].device)


def save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    best: dict[str, Tensor],
    losses: Tensor,
    step: int,
    history: dict[str, Any],
) -> None:
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"best/{name}": value for name, value in best.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": value for name, value in state.items()}
    tensors["losses"] = losses
    tensors["random/cpu"] = torch.get_rng_state()
    device = next(model.parameters()).device
    if device.type == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state(device)
    contiguous = {name: value.cpu().contiguous() for name, value in tensors.items()}
    files.write_bytes(
        path, to_bytes(contiguous, {"progress": json.dumps({"step": step, "history": history})})
    )


def load(path: Path) -> Checkpoint | None:
    """The checkpoint in `path`; None when there is none, or when a crash of the machine left it unreadable."""
    try:
        with safe_open(path, framework="pt") as opened:
            progress = json.loads(opened.metadata()["progress"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except (FileNotFoundError, SafetensorError):
        return None
    groups: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "random": {}, "optimizer": {}}
    for name, value in tensors.items():
        group, _, rest = name.partition("/")
        if group in groups:
            groups[group][rest] = value
    optimizer: dict[int, dict[str, Tensor]] = {}
    for name, value in groups["optimizer"].items():
        index, _, key = name.partition("/")
        optimizer.setdefault(int(index), {})[key] = value
    return Checkpoint(
        progress["step"],
        groups["model"],
        optimizer,
        groups["best"],
        groups["random"],
        tensors["losses"],
        progress["history"],
    )
