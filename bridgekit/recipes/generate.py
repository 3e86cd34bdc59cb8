"""`generate`: sounds, pictures or texts into pictures, through a bridge."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from torch import Tensor

from bridgekit.bridge.bridge import Bridge
from bridgekit.bridge.provenance import command_line, installed_version
from bridgekit.diffusion.conditioner import (
    GAPS,
    Conditioner,
    close_gap,
)
from bridgekit.diffusion.models import DrawOptions, open_model
from bridgekit.diffusion.painter import mix, open_painter, paint
from bridgekit.diffusion.sheets import contact_sheet, made_here, write_png
from bridgekit.encoders import TEXT, Item
from bridgekit.errors import BridgekitError
from bridgekit.progress import Report, progress_bars
from bridgekit.recipes.sides import takes
from bridgekit.retrieval import Hit
from bridgekit.tables.reading import read_items

#: Bytes of a file's name without its extension: file systems allow 255, some of which the writing aside takes.
NAME_BYTES = 190


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


@dataclass(frozen=True)
class GenerateOptions(DrawOptions):
    """What `generate` is asked to do.

    Arguments:
        bridge: the bridge's folder.
        inputs: mixed into one picture by their weights. One may be a folder or list: then there is a picture for each in it.
        model: a plugin's text-to-image model, a folder in the layout of diffusers, or a hub id.
        n: images per input, with consecutive seeds.
        seed: seed of the first image.
        captions: a table, text file or folder to fit the conditioner on, in place of the bridge's own captions (or pictures).
        refit: fit the conditioner again.
        out: a .png for one picture, or a folder; by default named after the input, here.
        device: a torch device, or `auto`.
        outside: let tables name files outside their own folders, and folders hold links that leave them.
        progress: show progress bars on standard error.
        prompt, prompt_weight, gap, steps, guidance, size: see `DrawOptions`.
    """

    bridge: str | Path
    inputs: Sequence[Input]
    _: KW_ONLY
    model: str | None = None
    n: int = 1
    seed: int = 0
    captions: str | Path | None = None
    refit: bool = False
    out: str | Path | None = None
    device: str = "auto"
    outside: bool = False
    progress: bool = True


@takes(GenerateOptions)
def generate(options: GenerateOptions) -> Generation:
    """Turn sounds (or whatever a bridge joins) into pictures.

    `generate(bridge, inputs, *, ...)`: the arguments are those of `GenerateOptions`.

    Returns:
        the pictures, written.

    Raises:
        BridgekitError: anything that the caller can mend; the message says how.
    """
    folder, inputs, n = Path(options.bridge), options.inputs, options.n
    bridge = Bridge.load(folder, options.device)
    _check(options)
    rows = _rows(bridge, inputs, options.outside)
    with progress_bars(options.progress) as report:
        embedded, set_aside = _embed(bridge, inputs, rows, report)
        good = [row for row in rows if not any(item in set_aside for item in row)]
        named = [row for row in good for _ in range(n)]
        files, sheet = _places(options.out, named, n)
        report("loading model", 0, 1)
        painter = open_painter(
            bridge,
            open_model(options.model, options.device),
            folder,
            captions=options.captions,
            refit=options.refit,
            outside=options.outside,
            report=report,
        )
        vectors = [
            close_gap(bridge, painter.conditioner, given.modality, vector, options.gap)
            for given, vector in zip(inputs, embedded, strict=True)
        ]
        weights = [given.weight for given in inputs]
        seeds = [options.seed + number for number in range(n)] * len(good)
        pictures = paint(painter, mix(vectors, weights).repeat_interleave(n, 0), options, seeds=seeds, report=report)
    nearest = [found for found in painter.conditioner.nearest(mix(embedded, weights)) for _ in range(n)]
    metadata = {
        "bridge": str(folder),
        "model": painter.model.name,
        "prompt": options.prompt,
        "gap": options.gap,
        "command": command_line(),
        "bridgekit": installed_version(),
    }
    records = []
    for file, picture, row, found, seed in zip(files, pictures, named, nearest, seeds, strict=True):
        heard = [(hit.item, hit.similarity) for hit in found]
        write_png(picture, file, {"inputs": row, "seed": seed, "nearest": heard, **metadata})
        records.append(Generated(file, tuple(row), found, seed))
    if sheet:
        labels = [[_short(row), str(found[0].item) if found else ""] for row, found in zip(named, nearest, strict=True)]
        write_png(contact_sheet(pictures, labels), sheet, metadata)
    return Generation(records, sheet, set_aside, painter.conditioner, painter.fitted)


def _check(options: GenerateOptions) -> None:
    if options.gap not in GAPS:
        raise BridgekitError(f"there is no way {options.gap!r} to close the gap", remedy=f"use one of {', '.join(GAPS)}")
    weights = [given.weight for given in options.inputs]
    if not 0 <= options.prompt_weight <= 1 or options.n < 1 or any(not 0 < weight < math.inf for weight in weights):
        raise BridgekitError("weights are above 0, a prompt's at most 1, and there is at least one picture")


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
