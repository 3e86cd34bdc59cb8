"""Reading a bridge's folder, which may be untrusted: every field is checked before anything is built or allocated from it."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor

from bridgekit.encoders import is_modality
from bridgekit.errors import BridgekitError
from bridgekit.fusion.training import TEMPERATURE_BOUNDS, Preset
from bridgekit.hardware import free_memory
from bridgekit.plain import plain
from bridgekit.storage.bounded import OutOfBounds, homes, is_within, parse_json, read_bounded, read_json, why_no_json
from bridgekit.storage.tensors import Listed, TensorFile, open_tensors

FORMAT = 1
MAX_METADATA = 16 << 20  # bytes of bridge.json
MAX_LINE, MAX_HISTORY = 64 << 10, 64 << 20  # bytes of a line of history.jsonl, and of the whole file
MAX_SIDES = 32
MAX_DIM = 1 << 16
MAX_TEXT = 4_096  # characters of a name, a path or a revision
#: Types of tensors in adapters.safetensors.
_FLOATS = {"F32": torch.float32, "F16": torch.float16}


# ---- reading the files


def damaged(folder: Path, why: str) -> BridgekitError:
    """The error for a damaged bridge."""
    return BridgekitError(f"this bridge is damaged: {why}", where=str(folder), remedy="copy it again, or train it again")


def check_links(folder: Path) -> None:
    """Raise BridgekitError if a bridge has links that lead outside its folder.

    Binding to it or sharing it would copy their targets, and conditioners would be written there. The path of the folder itself
    may have links, and files in the hub's cache may be links into its blobs.
    """
    own = homes(folder)
    try:
        files = [*folder.iterdir(), *(folder / "conditioners").glob("*")]
        outside = [file for file in files if file.is_symlink() and not is_within(file, own)]
    except OSError as error:
        raise damaged(folder, f"its folder cannot be read ({error.strerror})") from None
    if outside:
        raise BridgekitError(
            f"this bridge has a link that leaves its folder: {outside[0].relative_to(folder)}",
            where=str(folder),
            remedy="remove the link, or replace it with the file itself",
        )


def read_metadata(folder: Path) -> dict[str, Any]:
    """The content of `bridge.json`, after checking the type and range of every field.

    Raises:
        BridgekitError: there is no bridge, it is damaged (the message names the field), or a newer version wrote it.
    """
    file = folder / "bridge.json"
    if not os.path.lexists(file):
        raise BridgekitError(
            "there is no bridge here" if folder.exists() else "there is no such folder",
            where=str(folder),
            remedy="train one: bridgekit align --a audio --b text",
        )
    check_links(folder)
    try:
        metadata = read_json(file, MAX_METADATA)
    except (OSError, ValueError) as error:
        raise damaged(folder, f"bridge.json cannot be read ({_reason(error)})") from None
    if not isinstance(metadata, dict):
        raise damaged(folder, "bridge.json is not a JSON object")
    version = metadata.get("format")
    if _integer(FORMAT + 1, math.inf).holds(version):
        raise BridgekitError(
            f"this bridge has format {version}; this bridgekit reads format {FORMAT}",
            where=str(folder),
            remedy="install a newer version of bridgekit",
        )
    if isinstance(metadata.get("preset"), dict):
        for name in _RETIRED_FIELDS:
            metadata["preset"].pop(name, None)
    fault = _fault(metadata)
    if fault:
        raise damaged(folder, f"in bridge.json, {fault}")
    return metadata


def read_history(folder: Path) -> list[dict[str, float]]:
    """The records of `history.jsonl`: name to number.

    Raises:
        BridgekitError: it is missing or damaged.
    """
    records = []
    try:
        for number, line in enumerate(read_bounded(folder / "history.jsonl", MAX_HISTORY).splitlines(), 1):
            if line.strip():
                record = parse_json(line, limit=MAX_LINE)
                if not isinstance(record, dict) or not all(_is_number(value) for value in record.values()):
                    raise OutOfBounds(f"line {number} is not a JSON object of numbers")
                records.append(record)
    except (OSError, ValueError) as error:
        raise damaged(folder, f"history.jsonl cannot be read ({_reason(error)})") from None
    return records


def read_tensors(
    folder: Path,
    sha256: str,
    shapes: Mapping[str, tuple[int, ...]],
    optional: Mapping[str, tuple[int, ...]],
    up_to: Mapping[str, tuple[int, ...]],
) -> dict[str, Tensor]:
    """The tensors of `adapters.safetensors`, all finite, as float32. Only a file that lists exactly these is read, once.

    All tensors in `shapes` must be there, those in `optional` may be, and so may those in `up_to`, with at least one row and no
    more rows than it says; `sha256`, from `bridge.json`, is the file's checksum.

    Raises:
        BridgekitError: the file is missing, or is not the one that `bridge.json` describes.
    """
    known = {**shapes, **optional, **up_to}
    tensors: dict[str, Tensor] = {}
    digest = hashlib.sha256()
    try:
        with open_tensors(folder / "adapters.safetensors", len(known), digest) as file:
            listed = {each.name: each for each in file.listed}
            for name in (*shapes, *listed):
                if fault := _misfit(listed.get(name), known.get(name), name, any_rows=name in up_to):
                    raise damaged(folder, f"in adapters.safetensors, {fault}")
            needed, free = 4 * sum(math.prod(each.shape) for each in file.listed), free_memory()
            if needed > free:
                raise OutOfBounds(f"it takes {needed / 1e9:,.1f} GB of memory, of which {free / 1e9:,.1f} GB are free")
            faults = []
            for each in file.listed:
                tensors[each.name], fault = _read_floats(file, each)
                faults += [fault] if fault else []
        if digest.hexdigest() != sha256:
            raise OutOfBounds("its SHA-256 is not the one in bridge.json")
    except BridgekitError:
        raise
    except Exception as error:  # torch may raise anything where memory is short
        raise damaged(folder, f"adapters.safetensors cannot be used ({_reason(error)})") from None
    if faults:
        raise damaged(folder, f"in adapters.safetensors, {faults[0]}")
    return tensors


def _misfit(listed: Listed | None, shape: tuple[int, ...] | None, name: str, *, any_rows: bool) -> str | None:
    """Why a tensor that is listed, or not, is not the one that belongs there. With `any_rows`, `shape` has the most rows."""
    if listed is None:
        return f"the tensor {name} is missing"
    if shape is None:
        return f"the tensor {name[:100]!r} belongs to no side of this bridge"
    if any_rows and len(listed.shape) == len(shape):
        shape = (min(max(listed.shape[0], 1), shape[0]), *shape[1:])
    if listed.dtype not in _FLOATS or listed.shape != shape:
        return f"the tensor {name} is {listed.dtype} of shape {listed.shape}, not F32 of shape {shape}"
    return None


def _read_floats(file: TensorFile, listed: Listed) -> tuple[Tensor, str | None]:
    """The next tensor as float32, and what is wrong with its numbers."""
    tensor = torch.empty(listed.shape, dtype=_FLOATS[listed.dtype])
    finite = positive = True
    for part in file.read_into(tensor.reshape(-1).view(torch.uint8).numpy().data):
        numbers = torch.frombuffer(part, dtype=tensor.dtype)
        finite = finite and bool(numbers.isfinite().all())
        positive = positive and bool((numbers > 0).all())
    if not finite:
        return tensor, f"{listed.name} has values that are not finite"
    if listed.name.endswith(".std") and not positive:
        return tensor, f"{listed.name} has standard deviations that are not above 0"
    return tensor.float(), None


def _reason(error: Exception) -> str:
    text = why_no_json(error) if isinstance(error, ValueError) else getattr(error, "strerror", None) or str(error)
    return " ".join(text.split())[:200] or type(error).__name__


# ---- the schema of bridge.json


class Rule(NamedTuple):
    """What a value must be, in words and as a test."""

    must_be: str
    holds: Callable[[Any], bool]


#: A rule for a value, or a schema for each field of an object or for all elements of a list. A field `name?` is optional; `*`
#: stands for any other field.
Schema = Rule | dict[str, "Schema"] | list["Schema"]


def _faults(value: Any, schema: Schema, path: str = "") -> Iterator[str]:
    """A sentence for each violation of the schema."""
    if isinstance(schema, Rule):
        if not schema.holds(value):
            yield f"`{path}` must be {schema.must_be}"
    elif isinstance(schema, list) and isinstance(value, list):
        for number, each in enumerate(value):
            yield from _faults(each, schema[0], f"{path}[{number}]")
    elif isinstance(schema, dict) and isinstance(value, dict):
        prefix = f"{path}." if path else ""
        known = {name.rstrip("?"): inner for name, inner in schema.items() if name != "*"}
        for name in known:
            if name in schema and name not in value:
                yield f"`{prefix}{name}` is missing"
        for name, each in value.items():
            if (inner := known.get(name, schema.get("*"))) is not None:
                yield from _faults(each, inner, prefix + name[:60])
    else:
        yield f"`{path}` must be {'a list' if isinstance(schema, list) else 'an object'}"


def _is_number(value: object, low: float = -1e300, high: float = 1e300) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _number(low: float, high: float) -> Rule:
    return Rule(f"a number from {low:g} to {high:g}", lambda value: _is_number(value, low, high))


def _integer(low: float, high: float) -> Rule:
    return Rule(f"an integer from {low:,} to {high:,}", lambda value: isinstance(value, int) and _is_number(value, low, high))


def _text(low: int) -> Rule:
    what = f"a text of {low} to {MAX_TEXT:,} characters"
    return Rule(what, lambda value: isinstance(value, str) and low <= len(value) <= MAX_TEXT)


def _line(what: str, holds: Callable[[str], bool] = bool) -> Rule:
    return Rule(what, lambda value: _text(1).holds(value) and plain(value) == value and holds(value))


def _one_of(names: Collection[str]) -> Rule:
    return Rule(f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names)


_BOOLEAN = Rule("true or false", lambda value: isinstance(value, bool))
_NUMBERS: Schema = {"*": Rule("a number", _is_number)}
_SHA256 = re.compile("[0-9a-f]{64}")
_UNKNOWN = Rule("left out: this version does not know it", lambda _: False)

_SIDE: Schema = {
    "encoder": _line("a name like provider:model", lambda value: ":" in value[1:]),
    "revision": _line(f"one line of at most {MAX_TEXT:,} characters"),
    "dim": _integer(1, MAX_DIM),
    "frozen": _BOOLEAN,
    "*": _UNKNOWN,
}

#: The bounds of a preset's numbers; 0 to a million for those not listed.
_PRESET_BOUNDS: Mapping[str, tuple[float, float]] = {
    "shared_dim": (1, MAX_DIM),
    "blocks": (0, 64),
    "expansion": (0.01, 64),
    "dropout": (0, 0.99),
    "input_dropout": (0, 0.99),
    "batch_size": (2, 1 << 40),
    "epochs": (1, 1_000_000_000),
    "lr": (0, 1e12),
    "min_lr": (0, 1e12),
    "temperature": (1e-6, 1e6),
}

#: Fields of a preset that earlier versions wrote. They only affected training, and are ignored.
_RETIRED_FIELDS = ("alpha_end", "patience", "keep_best")


def _preset_rule(name: str, kind: Any) -> Rule:
    if choices := get_args(kind):
        return _one_of(choices)
    if kind is bool:
        return _BOOLEAN
    return (_integer if kind is int else _number)(*_PRESET_BOUNDS.get(name, (0, 1_000_000)))


_PRESET: Schema = {**{f"{name}?": _preset_rule(name, kind) for name, kind in get_type_hints(Preset).items()}, "*": _UNKNOWN}

_METRIC: Schema = {
    **dict.fromkeys(("split", "among", "method"), _text(1)),
    "direction": Rule("two modalities, like audio → text", lambda value: _text(1).holds(value) and value.count(" → ") == 1),
    **dict.fromkeys(("queries", "candidates"), _integer(0, 2**53)),
    **dict.fromkeys(("recall@1", "recall@5", "recall@10"), _number(0, 1)),
    "median_rank": _number(0, 2**53),
}


def _schema(modalities: Collection[str]) -> Schema:
    """The schema of the metadata of a bridge with these modalities."""
    modality, (low, high) = _one_of(modalities), TEMPERATURE_BOUNDS
    table: dict[str, Schema] = {
        "pairs?": _text(0),
        "fingerprint?": _text(0),
        "modalities?": [modality],
        "seed?": _integer(0, 2**64 - 1),
        **dict.fromkeys(("rows?", "modality_gap?", "pair_cosine?", "sure?"), _NUMBERS),
    }
    bound: Schema = {**table, "modality": modality, "fingerprint": _text(0), "bound?": Rule("left out", lambda _: False)}
    return {
        "format": Rule(str(FORMAT), _integer(FORMAT, FORMAT).holds),
        "sides": dict.fromkeys(modalities, _SIDE),
        "preset": _PRESET,
        "dim": _integer(1, MAX_DIM),
        "temperature": _number(0.99 * low, 1.01 * high),  # wider: earlier versions clamped the logarithm
        "adapters_sha256": Rule("a SHA-256 in hexadecimal", lambda value: bool(_SHA256.fullmatch(str(value)))),
        "provenance": {**table, "bound?": [bound]},
        "metrics": [_METRIC],
    }


def _fault(metadata: Mapping[str, Any]) -> str | None:
    """The first fault in a bridge's metadata: the field and what it must be."""
    sides = metadata.get("sides")
    if not isinstance(sides, dict) or not 1 <= len(sides) <= MAX_SIDES or not all(map(is_modality, sides)):
        return f"`sides` must be an object of 1 to {MAX_SIDES} sides, each under the name of a modality"
    if fault := next(_faults(metadata, _schema(sides)), None):
        return fault
    frozen = [side["dim"] for side in sides.values() if side["frozen"]]
    for width in frozen or [metadata["preset"].get("shared_dim", Preset.shared_dim)]:
        if width != metadata["dim"]:
            return f"`dim` must be {width}, the width of {'the frozen side' if frozen else '`preset.shared_dim`'}"
    return None
