"""A bridge's folder as a stranger may have written it: every field is checked before anything is built or allocated from it."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import load
from torch import Tensor

from bridgekit.bounded import OutOfBounds, homes, is_within, open_regular, parse_json, read_bounded, read_json, why_no_json
from bridgekit.encoders import is_modality
from bridgekit.errors import BridgekitError
from bridgekit.fusion.fusemix import LambdaPer, Pairing
from bridgekit.fusion.training import TEMPERATURE_BOUNDS, Preset
from bridgekit.plain import plain

FORMAT = 1
MAX_STORY = 16 << 20  # bytes of bridge.json
MAX_LINE, MAX_HISTORY = 64 << 10, 64 << 20  # bytes of a line of history.jsonl, and of all of it
MAX_HEADER = 16 << 20  # bytes of the list of tensors in adapters.safetensors
MAX_SIDES = 32
MAX_DIM = 1 << 16
MAX_TEXT = 4_096  # characters of a name, a path or a revision
#: The smallest and the largest value of a preset's fields; of those not named here the bounds are 0 and a million.
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
_CHOICES = {"pairing": get_args(Pairing), "lambda_per": get_args(LambdaPer)}
#: Fields of a preset that earlier versions wrote. They say nothing about how the adapters are used: reading drops them.
_RETIRED_FIELDS = ("alpha_end", "patience", "keep_best")
_SHA256 = re.compile("[0-9a-f]{64}")
_RECALLS = ("recall@1", "recall@5", "recall@10")


def damaged(folder: Path, why: str) -> BridgekitError:
    """What is said of a bridge that is not as it should be."""
    return BridgekitError(f"this bridge is damaged: {why}", where=str(folder), remedy="copy it again, or train it again")


def check_links(folder: Path) -> None:
    """Refuse a bridge whose files are links to places outside its folder.

    Whoever binds to it or shares it would carry a copy of what they lead to, and conditioners would be written there.

    Raises:
        BridgekitError: there is such a link. A link to the folder itself is fine, and so is the hub's cache.
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
            remedy="remove the link, or put the file itself in its place",
        )


def read_story(folder: Path) -> dict[str, Any]:
    """The content of `bridge.json`, with every field checked for its type and range.

    Raises:
        BridgekitError: there is no bridge, or it is damaged (the message names the field), or a newer version wrote it.
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
        story = read_json(file, MAX_STORY)
    except (OSError, ValueError) as error:
        raise damaged(folder, f"bridge.json cannot be read ({_reason(error)})") from None
    if not isinstance(story, dict):
        raise damaged(folder, "bridge.json is no JSON object")
    version = story.get("format")
    if isinstance(version, int) and not isinstance(version, bool) and version > FORMAT:
        raise BridgekitError(
            f"this bridge has format {version}; this bridgekit reads format {FORMAT}",
            where=str(folder),
            remedy="install a newer bridgekit, from where this one came",
        )
    if isinstance(story.get("preset"), dict):
        story["preset"] = {name: value for name, value in story["preset"].items() if name not in _RETIRED_FIELDS}
    wrong = next(_wrong(story), None)
    if wrong:
        raise damaged(folder, f"in bridge.json, {wrong}")
    return story


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
                    raise OutOfBounds(f"line {number} is no JSON object of numbers")
                records.append(record)
    except (OSError, ValueError) as error:
        raise damaged(folder, f"history.jsonl cannot be read ({_reason(error)})") from None
    return records


def read_tensors(
    folder: Path, sha256: str, shapes: Mapping[str, tuple[int, ...]], optional: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The tensors of `adapters.safetensors`, all float32 and finite.

    The list of what is in the file is compared with what must be in it, and its size with both, before any of it is read.

    Arguments:
        folder: the bridge's.
        sha256: the file's, by `bridge.json`.
        shapes: name to shape of each tensor that must be there.
        optional: of each that may be.

    Raises:
        BridgekitError: it is not that file.
    """
    wanted = sum(map(math.prod, shapes.values())) + sum(map(math.prod, optional.values()))
    try:
        with open_regular(folder / "adapters.safetensors") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > min(size - 8, MAX_HEADER):
                raise OutOfBounds("its list of tensors is longer than the file, or than may be")
            if size > 8 + length + 4 * wanted:
                raise OutOfBounds(f"it has {size:,} bytes, more than its tensors can fill")
            listed = file.read(length)
            _check_listed(parse_json(listed), shapes, optional)
            weights = head + listed + file.read(4 * wanted)
        if hashlib.sha256(weights).hexdigest() != sha256:
            raise OutOfBounds("it is not the file that bridge.json describes: its SHA-256 is another")
        tensors = load(weights)
    except Exception as error:  # safetensors has errors of its own; torch raises what it likes
        raise damaged(folder, f"adapters.safetensors cannot be used ({_reason(error)})") from None
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise damaged(folder, f"in adapters.safetensors, {name} holds numbers that are not finite")
        if name.endswith(".std") and not bool((tensor > 0).all()):
            raise damaged(folder, f"in adapters.safetensors, {name} holds deviations that are not above 0")
    return tensors


def _check_listed(listed: Any, shapes: Mapping[str, tuple[int, ...]], optional: Mapping[str, tuple[int, ...]]) -> None:
    if not isinstance(listed, dict):
        raise OutOfBounds("its list of tensors is no JSON object")
    for name in shapes:
        if name not in listed:
            raise OutOfBounds(f"it has no tensor {name}")
    for name, told in listed.items():
        if name == "__metadata__":
            continue
        shape = shapes.get(name, optional.get(name))
        if shape is None:
            raise OutOfBounds(f"it has a tensor {name[:100]!r}, which belongs to no side of this bridge")
        if not isinstance(told, dict) or told.get("dtype") != "F32":
            raise OutOfBounds(f"its tensor {name} is not float32")
        if told.get("shape") != list(shape):
            found = str(told.get("shape"))[:60]
            raise OutOfBounds(f"its tensor {name} has the shape {found} where bridge.json makes it {list(shape)}")


# ---- the fields of bridge.json, a sentence for each that is wrong. Only the first is asked for: what is checked later relies
# on what was checked before.


def _wrong(story: Mapping[str, Any]) -> Iterator[str]:
    if story.get("format") != FORMAT or isinstance(story["format"], bool):
        yield f"`format` is not {FORMAT}"
    yield from _wrong_sides(story.get("sides"))
    yield from _wrong_preset(story.get("preset"))
    if not _is_whole(story.get("dim"), 1, MAX_DIM):
        yield f"`dim` is no whole number from 1 to {MAX_DIM:,}"
    frozen = [side["dim"] for side in story["sides"].values() if side["frozen"]]
    if any(dim != story["dim"] for dim in frozen or [story["preset"].get("shared_dim", Preset().shared_dim)]):
        yield f"`dim` is {story['dim']}, and its {'frozen side' if frozen else 'preset'} says otherwise"
    low, high = TEMPERATURE_BOUNDS
    # A little beyond them: earlier versions clamped the logarithm of the temperature.
    if not _is_number(story.get("temperature"), 0.99 * low, 1.01 * high):
        yield f"`temperature` is no number from {low} to {high}"
    if not isinstance(story.get("adapters_sha256"), str) or not _SHA256.fullmatch(story["adapters_sha256"]):
        yield "`adapters_sha256` is no SHA-256 in hexadecimal"
    yield from _wrong_provenance(story.get("provenance"), story["sides"])
    yield from _wrong_metrics(story.get("metrics"))


def _wrong_sides(sides: object) -> Iterator[str]:
    if not isinstance(sides, dict) or not 1 <= len(sides) <= MAX_SIDES:
        yield f"`sides` is no object of 1 to {MAX_SIDES} modalities"
        return
    kinds: Mapping[str, tuple[Callable[[Any], bool], str]] = {
        "encoder": (lambda value: _is_name(value) and ":" in value[1:], "no name like provider:model"),
        "revision": (_is_name, "no text of one line"),
        "dim": (lambda value: _is_whole(value, 1, MAX_DIM), f"no whole number from 1 to {MAX_DIM:,}"),
        "frozen": (lambda value: isinstance(value, bool), "neither true nor false"),
    }
    for modality, side in sides.items():
        if not is_modality(modality):
            yield f"`sides` has {modality[:60]!r}, which is no name of a modality"
        if not isinstance(side, dict) or set(side) != set(kinds):
            yield f"`sides.{modality}` is no object with the fields {', '.join(kinds)}"
            return
        for name, (good, reason) in kinds.items():
            if not good(side[name]):
                yield f"`sides.{modality}.{name}` is {reason}"


def _wrong_preset(preset: object) -> Iterator[str]:
    if not isinstance(preset, dict):
        yield "`preset` is no object"
        return
    known = {field.name: field.default for field in fields(Preset)}
    for name, value in preset.items():
        if name not in known:
            yield f"`preset` has a field {name[:60]!r}, which this version does not know"
        elif name in _CHOICES:
            if value not in _CHOICES[name]:
                yield f"`preset.{name}` is none of {', '.join(_CHOICES[name])}"
        elif isinstance(known[name], bool):
            if not isinstance(value, bool):
                yield f"`preset.{name}` is neither true nor false"
        else:
            low, high = _PRESET_BOUNDS.get(name, (0, 1_000_000))
            whole = isinstance(known[name], int)
            if not (_is_whole if whole else _is_number)(value, low, high):
                yield f"`preset.{name}` is no {'whole ' if whole else ''}number from {low:,} to {high:,}"


def _wrong_provenance(story: object, sides: Mapping[str, Any], within: str = "provenance") -> Iterator[str]:
    if not isinstance(story, dict):
        yield f"`{within}` is no object"
        return
    for name in ("pairs", "fingerprint"):
        if not isinstance(story.get(name, ""), str) or len(story.get(name, "")) > MAX_TEXT:
            yield f"`{within}.{name}` is no text of at most {MAX_TEXT:,} characters"
    modalities = story.get("modalities", [])
    if not isinstance(modalities, list) or not all(_is_text(name) and name in sides for name in modalities):
        yield f"`{within}.modalities` is no list of this bridge's modalities"
    if not _is_whole(story.get("seed", 0), 0, 2**64 - 1):
        yield f"`{within}.seed` is no whole number from 0"
    for name in ("rows", "modality_gap", "pair_cosine"):
        counts = story.get(name, {})
        if not isinstance(counts, dict) or not all(_is_number(count) for count in counts.values()):
            yield f"`{within}.{name}` is no object of numbers"
    if not isinstance(story.get("bound", []), list):
        yield f"`{within}.bound` is no list"
        return
    for number, bound in enumerate(story.get("bound", [])):
        place = f"{within}.bound[{number}]"
        yield from _wrong_provenance(bound, sides, place)
        if bound.get("modality") not in sides or "fingerprint" not in bound or "bound" in bound:
            yield f"`{place}` does not say which of this bridge's modalities was bound"


def _wrong_metrics(metrics: object) -> Iterator[str]:
    if not isinstance(metrics, list):
        yield "`metrics` is no list"
        return
    for number, record in enumerate(metrics):
        if not isinstance(record, dict):
            yield f"`metrics[{number}]` is no object"
            return
        for name in ("split", "direction", "among", "method"):
            if not _is_text(record.get(name)):
                yield f"`metrics[{number}].{name}` is no text"
        if len(record["direction"].split(" → ")) != 2:
            yield f"`metrics[{number}].direction` does not name two modalities"
        for name in ("queries", "candidates"):
            if not _is_whole(record.get(name), 0, 2**53):
                yield f"`metrics[{number}].{name}` is no whole number from 0"
        if not all(_is_number(record.get(name), 0, 1) for name in _RECALLS):
            yield f"`metrics[{number}]` has a recall that is no number from 0 to 1"
        if not _is_number(record.get("median_rank"), 0, 2**53):
            yield f"`metrics[{number}].median_rank` is no number from 0"


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_TEXT


def _is_name(value: object) -> bool:
    return _is_text(value) and plain(value) == value


def _is_whole(value: object, low: float, high: float) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: object, low: float = -1e300, high: float = 1e300) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _reason(error: Exception) -> str:
    text = why_no_json(error) if isinstance(error, ValueError) else getattr(error, "strerror", None) or str(error)
    return " ".join(text.split())[:200] or type(error).__name__
