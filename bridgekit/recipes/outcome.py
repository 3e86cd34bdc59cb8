"""What `align` and `bind` share besides training: provenance, fingerprint, checks."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bridgekit.bridge.bridge import Bridge
from bridgekit.bridge.provenance import command_line, installed_version
from bridgekit.encoders import Encoder, Item
from bridgekit.errors import BridgekitError
from bridgekit.evaluation.leaks import refuse_leaks
from bridgekit.fusion.distributed import first_process_first
from bridgekit.hardware import product_dtype
from bridgekit.latents.encoded import EncodedPairs, encode_pairs
from bridgekit.pairs import Pairs, SetAside
from bridgekit.progress import Report
from bridgekit.recipes.sides import TrainingOptions
from bridgekit.storage.cache import cache_folder
from bridgekit.tables.splits import split_pairs, test_splits


@dataclass(frozen=True)
class Alignment:
    """Summary of an `align` or `bind` run.

    Arguments:
        bridge: the saved bridge.
        folder: its folder.
        set_aside: the rows that were not used.
        example: an item not seen in training, to try a search with.
        reused: whether the bridge already existed, from an identical call.
    """

    bridge: Bridge
    folder: Path
    set_aside: Sequence[SetAside]
    example: Item
    reused: bool


def provenance_of(encoded: EncodedPairs, split: NDArray[np.str_], seed: int, device: str, started: float) -> dict[str, Any]:
    """The provenance record of a bridge, or of a modality bound to one."""
    return {
        "pairs": encoded.pairs.source,
        "modalities": list(encoded.ids),
        "rows": {name: int((split == name).sum()) for name in dict.fromkeys(split.tolist())},
        "set_aside": len(encoded.pairs.set_aside),
        "seed": seed,
        "device": device,
        "seconds": round(time.monotonic() - started, 1),
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(),
        "machine": f"{platform.system()} {platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads",
        "bridgekit": installed_version(),
    }


def encode_and_split(
    pairs: Pairs, encoders: Mapping[str, Encoder], options: TrainingOptions, report: Report, needs: str | None = None
) -> tuple[EncodedPairs, NDArray[np.str_]]:
    """Encode a table and split its rows, and check that it can be trained on.

    Arguments:
        pairs: the table.
        encoders: modality to its encoder.
        options: seed and strictness.
        report: progress.
        needs: drop rows without an item of this modality.

    Raises:
        BridgekitError: rows are duplicated across splits, or all rows have the same item of a modality.
    """
    with first_process_first():
        encoded = encode_pairs(pairs, encoders, report, strict=options.strict)
    split = np.asarray(split_pairs(encoded.pairs, options.seed, encoded.ids))
    if needs:
        rows = np.flatnonzero(encoded.ids[needs] >= 0)
        if not len(rows):
            raise BridgekitError(f"no row has {needs}", where=encoded.pairs.source)
        ids = {name: each[rows] for name, each in encoded.ids.items()}
        encoded = EncodedPairs(encoded.pairs.take(rows), encoded.latents, ids, encoded.keys[rows])
        split = split[rows]
    refuse_leaks(encoded, split)
    _check_variety(encoded)
    return encoded, split


def _check_variety(encoded: EncodedPairs) -> None:
    """Raise BridgekitError if all rows have the same item of a modality."""
    for modality, ids in encoded.ids.items():
        if len(np.unique(ids[ids >= 0])) < 2:
            raise BridgekitError(
                f"every row has the same {modality}, or none: there is nothing to learn", where=encoded.pairs.source
            )


def unseen_item(encoded: EncodedPairs, split: NDArray[np.str_], modality: str) -> Item:
    """An item of a modality that was not seen in training; if there is none, any item."""
    unseen = np.isin(split, test_splits(split.tolist())[:1] or ["val"])
    there = encoded.ids[modality] >= 0
    row = int(np.flatnonzero(unseen & there if (unseen & there).any() else there)[0])
    item = encoded.pairs.columns[modality][row]
    assert item is not None
    return item


def checkpoint_of(fingerprint: str, resume: bool) -> Path:
    """The path of a run's checkpoint. An existing one is removed unless the run resumes."""
    checkpoint = cache_folder() / "training" / f"{fingerprint}.safetensors"
    if not resume:
        checkpoint.unlink(missing_ok=True)
    return checkpoint


def fingerprint_of(encoded: EncodedPairs, split: NDArray[np.str_], **settings: Any) -> str:
    """A hash over everything that trained adapters depend on. Runs with the same fingerprint share checkpoints.

    Arguments:
        encoded: the table.
        split: each row's split.
        settings: everything else, as plain data.
    """
    inputs = {
        **settings,
        "latents": {modality: latents.fingerprint for modality, latents in encoded.latents.items()},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "products": str(product_dtype(settings["device"])),
        "bridgekit": installed_version(),
        "split": split.tolist(),
    }
    whole = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode())
    for ids in encoded.ids.values():
        whole.update(ids.tobytes())
    whole.update(encoded.keys.tobytes())
    return whole.hexdigest()[:32]
