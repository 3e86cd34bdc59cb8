"""Pictures from sounds: embeddings of a bridge, through a conditioner, into a text-to-image model."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bridgekit.bridge import Bridge
from bridgekit.card import command_line
from bridgekit.diffusion.conditioner import (
    GAPS,
    Conditioner,
    Fit,
    close_gap,
    direct_conditioner,
    fit_conditioner,
    load_conditioner,
    same_weights,
    save_conditioner,
)
from bridgekit.diffusion.conditioning import Conditioning
from bridgekit.diffusion.models import ImageModel, Watch, draw, open_model
from bridgekit.diffusion.sheets import contact_sheet, made_here, write_png
from bridgekit.encoders import TEXT, Item
from bridgekit.errors import BridgekitError
from bridgekit.pairs import read_items
from bridgekit.progress import Report, progress_bars, silent
from bridgekit.retrieval import Hit

if TYPE_CHECKING:
    from PIL.Image import Image

#: Bytes of a file's name without its extension: file systems allow 255, some of which the writing aside takes.
NAME_BYTES = 190


@dataclass(frozen=True)
class Painter:
    """A bridge and a text-to-image model, with the conditioner between them.

    Arguments:
        bridge: the bridge.
        model: the text-to-image model.
        conditioning: the one of the model's that is used.
        conditioner: from the bridge's space into it.
        fitted: whether the conditioner was fitted now rather than read from the bridge's folder.
    """

    bridge: Bridge
    model: ImageModel
    conditioning: Conditioning
    conditioner: Conditioner
    fitted: bool


def open_painter(
    bridge: Bridge,
    model: ImageModel,
    folder: Path | None = None,
    *,
    captions: str | Path | None = None,
    refit: bool = False,
    outside: bool = False,
    report: Report = silent,
) -> Painter:
    """Find or fit the conditioner between a bridge and a model.

    Arguments:
        bridge: the bridge.
        model: the text-to-image model.
        folder: the bridge's folder, where conditioners are kept; None keeps none, and so does a folder that is read-only.
        captions: what to fit it on, as for `read_items`; by default the distinct items of the bridge's own pairs.
        refit: fit it anew even where one is kept.
        outside: let the table of these name files outside its own folder.
        report: progress.

    Raises:
        BridgekitError: the bridge has no side that the model's conditioning could be learned from, or its pairs are gone.
    """
    file = folder / "conditioners" / f"{_slug(model.name)}.safetensors" if folder else None
    frozen = {modality: bridge.encoder(modality) for modality, side in bridge.sides.items() if side.frozen}
    for conditioning in model.conditionings:
        direct = [modality for modality, encoder in frozen.items() if conditioning.takes_latents_of(encoder)]
        if not direct and conditioning.made_of not in bridge.sides:
            continue
        modality = direct[0] if direct else conditioning.made_of
        own = read_items(captions, modality, outside=outside) if captions is not None else None
        kept = load_conditioner(file) if file and not refit else None
        fits = kept is not None and (kept.net is None) == bool(direct) and (own is None or _fitted_on(kept, own))
        # The bridge may have been replaced by another while this one was fitted.
        fits = fits and kept is not None and kept.adapter == bridge.weights_hash([modality])
        if kept and fits and same_weights(kept, conditioning):
            return Painter(bridge, model, conditioning, kept, fitted=False)
        items = own or _own_items(bridge, modality, outside)
        if direct:
            conditioner = direct_conditioner(bridge, conditioning, modality, items)
        else:
            conditioner = fit_conditioner(bridge, conditioning, items, report=report)
        if file:
            with suppress(BridgekitError):  # a bridge that lies where nothing can be written is as good, if slower
                save_conditioner(conditioner, file)
        return Painter(bridge, model, conditioning, conditioner, fitted=True)
    wanted = " or ".join(sorted({conditioning.made_of for conditioning in model.conditionings}))
    raise BridgekitError(
        f"this bridge joins {' and '.join(bridge.sides)}; the conditioning of {model.name} is made of {wanted}",
        remedy=f"train a bridge with a side for {wanted}, or use another --model",
    )


def _fitted_on(conditioner: Conditioner, items: Sequence[Item]) -> bool:
    """Whether it was fitted on these, or on as many of them as `fit_conditioner` draws."""
    return len(conditioner.items) == min(len(items), Fit().captions) and set(conditioner.items) <= set(map(str, items))


def _own_items(bridge: Bridge, modality: str, outside: bool) -> list[Item]:
    source = bridge.table_of(modality)
    try:
        if not source:
            raise BridgekitError("the bridge does not say what it was trained on")
        return read_items(bridge.followed(source), modality, outside=outside)
    except BridgekitError as error:
        raise BridgekitError(
            f"the conditioner is fitted on the bridge's own {modality} items, and they cannot be read: {error.what}",
            where=source or None,
            remedy="run it where the table is, or give a text file with --captions",
        ) from error


def _slug(name: str) -> str:
    return "".join(character if character.isalnum() or character in ".-" else "-" for character in name).strip("-.")[-80:]


def mix(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum of embeddings, (n, dim) each or (1, dim) for all, at unit length."""
    return normalize(sum((vector * weight for vector, weight in zip(vectors, weights, strict=True)), torch.zeros(1)), dim=-1)


def paint(
    painter: Painter,
    embeddings: Tensor,
    *,
    prompt: str | None = None,
    prompt_weight: float = 0.3,
    steps: int | None = None,
    guidance: float | None = None,
    seeds: Sequence[int] | int = 0,
    size: int | None = None,
    report: Report = silent,
    watch: Watch | None = None,
) -> list[Image]:
    """Pictures of embeddings that lie where the conditioner expects them (see `close_gap`).

    Arguments:
        painter: the bridge, the model and the conditioner.
        embeddings: (n, dim) at unit length.
        prompt: words that steer the style.
        prompt_weight: how much they count beside the embedding, from 0 to 1.
        steps, guidance: the sampler's; by default the model's own.
        seeds: one a picture, or one for all. A picture depends on its own seed alone, up to rounding.
        size: the side in pixels.
        report: progress, in steps.
        watch: told the latents after each step, see `bridgekit.diffusion.previews`. What it raises ends the drawing.

    Returns:
        n pictures.
    """
    tensors = painter.conditioner(embeddings)
    if prompt and painter.conditioning.made_of == TEXT:
        tensors = blend(tensors, painter.conditioning.encode([prompt]), prompt_weight)
    return draw(
        painter.model,
        painter.conditioning,
        tensors,
        prompt=prompt,
        steps=steps,
        guidance=guidance,
        seeds=seeds,
        size=size,
        report=report,
        watch=watch,
    )


def blend(tensors: Mapping[str, Tensor], other: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
    """A weighted mean of two conditionings, as of two prompts.

    Sequences are padded to the longer one; masks are joined. Where a mask says that only one of the two has something, that
    is what counts: what lies behind a mask is of no worth.
    """
    both: dict[str, tuple[Tensor, Tensor]] = {}
    for name in tensors.keys() & other.keys():
        this, that = tensors[name], other[name].to(tensors[name].dtype).expand(len(tensors[name]), *other[name].shape[1:])
        length = max(this.shape[1], that.shape[1])
        both[name] = (_pad(this, length), _pad(that, length))
    blended = dict(tensors)
    masks = [pair for pair in both.values() if pair[0].dtype == torch.bool]
    for name, (this, that) in both.items():
        if this.dtype == torch.bool:
            blended[name] = this | that
            continue
        share = torch.tensor(weight)
        for mine, theirs in masks:
            if this.ndim == 3 and mine.shape == this.shape[:2]:
                share = torch.where(mine & theirs, weight, theirs.float())[..., None]
        blended[name] = this.lerp(that, share)
    return blended


def _pad(tensor: Tensor, length: int) -> Tensor:
    missing = length - tensor.shape[1]
    return torch.cat([tensor, tensor.new_zeros(len(tensor), missing, *tensor.shape[2:])], 1) if missing else tensor


# ---- whole runs


@dataclass(frozen=True)
class Input:
    """What goes into the pictures from one modality.

    Arguments:
        modality: for example `audio`.
        item: a path or text; or a folder, or a list of paths or texts, each of which makes a picture of its own.
        weight: how much it counts in a mixture.
    """

    modality: str
    item: Item | Sequence[Item]
    weight: float = 1.0


@dataclass(frozen=True)
class Generated:
    """One picture.

    Arguments:
        file: where it is.
        inputs: what it was made from.
        nearest: the captions (or pictures) nearest to its embedding: what the model heard.
        seed: the noise's.
    """

    file: Path
    inputs: tuple[str, ...]
    nearest: Sequence[Hit]
    seed: int


@dataclass(frozen=True)
class Generation:
    """What a run of `generate` made.

    Arguments:
        pictures: one record a picture.
        sheet: the contact sheet, where there are several pictures.
        set_aside: input to reason, for those that could not be used.
        conditioner: the conditioner.
        fitted: whether it was fitted in this run.
    """

    pictures: Sequence[Generated]
    sheet: Path | None
    set_aside: Mapping[str, str]
    conditioner: Conditioner
    fitted: bool


def generate(
    bridge: str | Path,
    inputs: Sequence[Input],
    *,
    model: str | None = None,
    prompt: str | None = None,
    prompt_weight: float = 0.3,
    gap: str = GAPS[0],
    n: int = 1,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    size: int | None = None,
    captions: str | Path | None = None,
    refit: bool = False,
    out: str | Path | None = None,
    device: str = "auto",
    outside: bool = False,
    progress: bool = True,
) -> Generation:
    """Turn sounds (or whatever a bridge joins) into pictures.

    Arguments:
        bridge: the bridge's folder.
        inputs: mixed into one picture by their weights. One may be a folder or list: then there is a picture for each in it.
        model: a plugin's text-to-image model, a folder in the layout of diffusers, or a hub id.
        prompt, prompt_weight: words that steer the style, and how much they count beside the inputs, from 0 to 1.
        gap: how the gap between modalities is closed: `captions`, `mean` or `none`, see `conditioner.close_gap`.
        n: how many pictures of each, from seeds that follow each other.
        seed: the first one.
        steps, guidance, size: the sampler's and the picture's; by default the model's own.
        captions: a table, text file or folder to fit the conditioner on, in place of the bridge's own captions (or pictures).
        refit: fit the conditioner anew.
        out: a .png for one picture, or a folder; by default named after the input, here.
        device: a torch device, or `auto`.
        outside: let tables name files outside their own folders, and folders hold links that leave them.
        progress: show progress bars on standard error.

    Returns:
        the pictures, written.

    Raises:
        BridgekitError: anything that the caller can mend; the message says how.
    """
    folder = Path(bridge)
    opened = Bridge.load(folder, device)
    if gap not in GAPS:
        raise BridgekitError(f"there is no way {gap!r} to close the gap", remedy=f"use one of {', '.join(GAPS)}")
    if not 0 <= prompt_weight <= 1 or n < 1 or any(not 0 < given.weight < math.inf for given in inputs):
        raise BridgekitError("weights are above 0, a prompt's at most 1, and there is at least one picture")
    rows = _rows(opened, inputs, outside)
    with progress_bars(progress) as report:
        embedded, set_aside = _embed(opened, inputs, rows, report)
        good = [row for row in rows if not any(item in set_aside for item in row)]
        named = [row for row in good for _ in range(n)]
        files, sheet = _places(out, named, n)
        report("loading model", 0, 1)
        painter = open_painter(
            opened,
            open_model(model, device),
            folder,
            captions=captions,
            refit=refit,
            outside=outside,
            report=report,
        )
        vectors = [
            close_gap(opened, painter.conditioner, given.modality, vector, gap)
            for given, vector in zip(inputs, embedded, strict=True)
        ]
        mixed = mix(vectors, [given.weight for given in inputs])
        raw = mix(embedded, [given.weight for given in inputs])
        seeds = [seed + number for number in range(n)]
        pictures = paint(
            painter,
            mixed.repeat_interleave(n, 0),
            prompt=prompt,
            prompt_weight=prompt_weight,
            steps=steps,
            guidance=guidance,
            seeds=seeds * len(good),
            size=size,
            report=report,
        )
    heard = [found for found in painter.conditioner.nearest(raw) for _ in seeds]
    story = {
        "bridge": str(folder),
        "model": painter.model.name,
        "prompt": prompt,
        "gap": gap,
        "command": command_line(),
        "bridgekit": version("bridgekit"),
    }
    records = []
    for file, picture, row, found, number in zip(files, pictures, named, heard, seeds * len(good), strict=True):
        nearest = [(hit.item, hit.similarity) for hit in found]
        write_png(picture, file, {"inputs": row, "seed": number, "nearest": nearest, **story})
        records.append(Generated(file, tuple(row), found, number))
    if sheet:
        labels = [[_short(row), str(found[0].item) if found else ""] for row, found in zip(named, heard, strict=True)]
        write_png(contact_sheet(pictures, labels), sheet, story)
    return Generation(records, sheet, set_aside, painter.conditioner, painter.fitted)


def _rows(bridge: Bridge, inputs: Sequence[Input], outside: bool) -> list[list[str]]:
    """The items of each picture, in the order of the inputs."""
    if not inputs:
        raise BridgekitError("there is nothing to make a picture of", remedy="give --audio, --image or --text")
    columns = [_items(bridge, given, outside) for given in inputs]
    many = [column for column, given in zip(columns, inputs, strict=True) if _is_many(given)]
    if len(many) > 1:
        raise BridgekitError("only one input may be a folder or a list", where=", ".join(column[0] for column in many))
    return [[column[row] if len(column) > 1 else column[0] for column in columns] for row in range(max(map(len, columns)))]


def _is_many(given: Input) -> bool:
    return not isinstance(given.item, str | Path) or (
        given.modality != TEXT and _exists(given.item) and Path(given.item).is_dir()
    )


def _exists(item: Item) -> bool:
    """Whether it is the path of something. A text may be longer than any path: then it is not."""
    try:
        return Path(item).exists()
    except OSError:
        return False


def _items(bridge: Bridge, given: Input, outside: bool) -> list[str]:
    bridge.side(given.modality)
    if not isinstance(given.item, str | Path):
        items = [str(item) for item in given.item]
    elif _is_many(given):
        items = [str(item) for item in read_items(given.item, given.modality, outside=outside)]
    else:
        items = [str(given.item)]
    missing = [item for item in items if given.modality != TEXT and not _exists(item)]
    if missing or not items:
        raise BridgekitError("there is no such file", where=missing[0][:200] if missing else None, remedy="check the path")
    return items


def _embed(
    bridge: Bridge, inputs: Sequence[Input], rows: Sequence[Sequence[str]], report: Report
) -> tuple[list[Tensor], dict[str, str]]:
    """Each input's embeddings, for those rows all of whose items can be used, and the items that cannot."""
    columns = [list(dict.fromkeys(row[at] for row in rows)) for at in range(len(inputs))]
    found = [bridge.embed_usable(given.modality, column, report=report) for given, column in zip(inputs, columns, strict=True)]
    set_aside = {
        column[position]: reason
        for column, result in zip(columns, found, strict=True)
        for position, reason in result.failed.items()
    }
    vectors = []
    for at, (column, result) in enumerate(zip(columns, found, strict=True)):
        place = {item: row for row, item in enumerate(item for item in column if item not in set_aside)}
        vectors.append(result.vectors[[place[row[at]] for row in rows if not any(item in set_aside for item in row)]])
    if not len(vectors[0]):
        item, reason = next(iter(set_aside.items()))
        raise BridgekitError(f"nothing can be made a picture of: {reason}", where=item[:200], remedy="mend or replace it")
    return vectors, set_aside


def _places(out: str | Path | None, rows: Sequence[Sequence[str]], n: int) -> tuple[list[Path], Path | None]:
    """A file for each picture, and one for the contact sheet of several: as the user says, or after the inputs.

    Files of one run never share a name. A file that is there already is only written over if the user named it, or if it is
    a picture of ours: a photo may well lie beside the clip that was taken with it.
    """
    if out is not None and Path(out).suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
        if Path(out).suffix.lower() != ".png":
            remedy = f"--out {Path(out).with_suffix('.png')}, or a folder"
            raise BridgekitError("pictures are written as PNG", where=str(out), remedy=remedy)
        if len(rows) > 1:
            raise BridgekitError(
                f"{len(rows)} pictures do not fit in one file", where=str(out), remedy="name a folder with --out"
            )
        _check_writable(Path(out), Path(out).parent)
        return [Path(out)], None
    folder = Path(out) if out is not None else Path() if len(rows) == 1 else Path("pictures")
    _check_writable(folder, folder)
    taken: set[str] = set()

    def free(base: str) -> Path:
        name, again = base, 2
        while name.casefold() in taken or not made_here(folder / f"{name}.png"):
            name, again = f"{base}-{again}", again + 1
        taken.add(name.casefold())
        return folder / f"{name}.png"

    sheet = free("sheet") if len(rows) > 1 else None
    return [free(_short(row) + (f"-{number % n}" if n > 1 else "")) for number, row in enumerate(rows)], sheet


def _check_writable(asked: Path, folder: Path) -> None:
    """Raise BridgekitError unless files may be written in a folder that may have to be made: better now than after drawing."""
    try:
        if asked != folder and asked.is_dir():
            raise IsADirectoryError(0, "this is a folder")
        # In the nearest folder that exists: a mistake found later should leave no empty folders behind.
        with tempfile.TemporaryFile(dir=next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())):
            return
    except OSError as error:
        raise BridgekitError(
            f"pictures cannot be written here: {error.strerror or error}", where=str(asked), remedy="choose another --out"
        ) from error


def _short(row: Sequence[str]) -> str:
    """Inputs as a name: a file's own without folder and extension, a text's first words."""
    names = (Path(item).stem if _exists(item) and Path(item).is_file() else item[:60] for item in row)
    name = " + ".join("".join(c if c.isalnum() or c in " -_.,'" else "_" for c in name).strip(" .") or "_" for name in names)
    return name[:80].encode()[:NAME_BYTES].decode(errors="ignore").strip(" .")
