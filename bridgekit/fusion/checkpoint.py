"""The state of a training run, and how it is saved and resumed: without pickle, and byte for byte."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bridgekit.errors import BridgekitError
from bridgekit.progress import say
from bridgekit.storage.bounded import parse_json
from bridgekit.storage.sealed import DamagedFile, read_sealed, write_sealed

#: A run that is killed loses at most this many seconds of training.
CHECKPOINT_SECONDS = 10.0


class TrainingState:
    """The weights, the optimizer, the validations so far, and the weights of the best of them.

    Arguments:
        model: what is trained.
        temperature: of the loss, learned or not.
        optimizer: of what is learned.
    """

    def __init__(self, model: nn.Module, temperature: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.temperature, self.optimizer = model, temperature, optimizer
        self.epoch = 0
        self.history: list[dict[str, float]] = []
        self._best_weights: dict[str, Tensor] = {}
        self._saved_at = time.monotonic()
        self._warned = False

    @property
    def best(self) -> dict[str, float] | None:
        """The record of the best validation, the first of equals; None if no score was a number."""
        records = [record for record in self.history if math.isfinite(record["score"])]
        return max(records, key=lambda record: record["score"], default=None)

    def is_finite(self) -> bool:
        """Whether all weights are finite."""
        return _all_finite(self._weights())

    def add(self, record: dict[str, float]) -> None:
        """Add a validation to the history, and keep the weights if it is the best so far."""
        self.history.append(record)
        if self.best is record:
            self._best_weights = {name: tensor.detach().clone() for name, tensor in self._weights().items()}

    def restore_best(self) -> None:
        """Go back to the weights of the best validation."""
        self._set_weights(self._best_weights)

    def save_when_due(self, path: Path) -> None:
        """`save`, if the last time was long enough ago. If it cannot be written, warn once and continue."""
        if time.monotonic() - self._saved_at <= CHECKPOINT_SECONDS:
            return
        try:
            self.save(path)
        except BridgekitError as error:
            if not self._warned:
                say(f"training continues without a checkpoint ({error.what}: {path.parent})")
            self._warned = True
        self._saved_at = time.monotonic()

    def save(self, path: Path) -> None:
        """Write the whole state, unless some of it is not finite.

        Raises:
            BridgekitError: it cannot be written.
        """
        moments = {
            f"optimizer/{number}/{name}": tensor
            for number, values in self.optimizer.state_dict()["state"].items()
            for name, tensor in values.items()
        }
        if not (self.is_finite() and _all_finite(moments)):
            return
        tensors = {f"now/{name}": tensor for name, tensor in self._weights().items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self._best_weights.items()}
        progress = json.dumps({"epoch": self.epoch, "history": self.history})
        write_sealed(path, tensors | moments, {"progress": progress})

    def resume(self, path: Path) -> None:
        """`load` a checkpoint if there is a usable one."""
        try:
            self.load(path)
        except FileNotFoundError:
            return
        except (DamagedFile, OSError, ValueError, KeyError, TypeError) as error:
            say(f"training starts again from the beginning: its checkpoint cannot be used ({error}: {path})")

    def load(self, path: Path) -> None:
        """Restore what `save` wrote. A file that does not fit changes nothing.

        Raises:
            DamagedFile: it is not what was written, or belongs to another run.
        """
        tensors, metadata = read_sealed(path)
        progress: dict[str, Any] = parse_json(metadata["progress"], lenient=True)
        epoch, history = int(progress["epoch"]), list(progress["history"])
        parts: dict[str, dict[str, Tensor]] = {"now": {}, "best": {}, "optimizer": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor.to(self.temperature.device)
        shapes = {name: tensor.shape for name, tensor in self._weights().items()}
        if any({name: tensor.shape for name, tensor in parts[part].items()} != shapes for part in ("now", "best")):
            raise DamagedFile("it belongs to another run")
        whole = self.optimizer.state_dict()
        for key, tensor in parts["optimizer"].items():
            number, _, name = key.partition("/")
            whole["state"].setdefault(int(number), {})[name] = tensor
        self.optimizer.load_state_dict(whole)
        self._set_weights(parts["now"])
        self._best_weights, self.epoch, self.history = parts["best"], epoch, history

    def _weights(self) -> dict[str, Tensor]:
        return {**self.model.state_dict(), "temperature": self.temperature.data}

    def _set_weights(self, tensors: Mapping[str, Tensor]) -> None:
        self.model.load_state_dict({name: tensor for name, tensor in tensors.items() if name != "temperature"})
        self.temperature.data.copy_(tensors["temperature"])


def _all_finite(tensors: Mapping[str, Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())
