"""`generate`: draw images from audio, images or text, through a bridge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from bridgekit.bridge.bridge import Bridge, Heard
from bridgekit.bridge.provenance import command_line, installed_version
from bridgekit.diffusion.conditioner import GAPS, Conditioner, close_gap
from bridgekit.diffusion.models import DrawOptions, open_model
from bridgekit.diffusion.painter import mix, open_painter, paint
from bridgekit.diffusion.sheets import contact_sheet, made_here, write_png
from bridgekit.encoders import TEXT, Blob, Item
from bridgekit.errors import BridgekitError
from bridgekit.progress import Report, progress_bars
from bridgekit.recipes.inputs import Inputs, exists, is_listing, list_items
from bridgekit.recipes.sides import takes
from bridgekit.retrieval import Hit
from bridgekit.storage.cache import check_writable

#: Maximum bytes of a file name without extension: file systems allow 255, and temporary names are longer.
NAME_BYTES = 190


@dataclass(frozen=True)
class Input:
    """An input of `generate`.

    Arguments:
        modality: for example `audio`.
        item: a path or text; or, for one image each, a folder or table of paths, or a list of paths or texts.
        weight: its weight in a mixture.
    """

    modality: str
    item: Item | Sequence[Item]
    weight: float = 1.0


@dataclass(frozen=True)
class Generated:
    """One generated image.

    Arguments:
        file: its path.
        inputs: the items it was generated from.
        nearest: the captions (or images) nearest to its embedding.
        seed: seed of its noise.
        heard: whether the bridge is sure of them, and whether a clip is speech.
    """

    file: Path
    inputs: tuple[str, ...]
    nearest: Sequence[Hit]
    seed: int
    heard: Heard


@dataclass(frozen=True)
class Generation:
    """The result of `generate`.

    Arguments:
        pictures: one record per image.
        sheet: the contact sheet, if there are several images.
        set_aside: input to reason, for inputs that could not be used.
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
    """Options of `generate`.

    Arguments:
        bridge: the bridge's folder.
        inputs: mixed into one image by weight. One may be a folder, table or list: then each of its items gets an image.
        model: a plugin's text-to-image model, a diffusers folder, or a hub id.
        n: images per input, with consecutive seeds.
        seed: seed of the first image.
        captions: a table, text file or folder to fit the conditioner on, instead of the bridge's own captions (or images).
        refit: fit the conditioner again.
        out: a .png for one image, or a folder; by default named after the input.
        device: a torch device, or `auto`.
        outside: let tables refer to files outside their own folders, and folders contain links that lead outside.
        columns: modality to the name of its column in tables, where that is not the modality's.
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
    columns: Mapping[str, str] = field(default_factory=dict)
    progress: bool = True


@takes(GenerateOptions)
def generate(options: GenerateOptions) -> Generation:
    """Generate images from audio, or from any modality of a bridge.

    `generate(bridge, inputs, *, ...)`: takes the fields of `GenerateOptions`.

    Returns:
        the images, written to files.

    Raises:
        BridgekitError: anything the caller can fix; the message says how.
    """
    folder, inputs, n = Path(options.bridge), options.inputs, options.n
    bridge = Bridge.load(folder, options.device)
    _check(options)
    columns = [_items(bridge, each, options) for each in inputs]
    rows = _rows(columns, inputs)
    with progress_bars(options.progress) as report:
        embedded, set_aside = _embed(bridge, inputs, rows, report)
        good = [row for row in rows if not any(str(item) in set_aside for item in row)]
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
            columns=options.columns,
            report=report,
        )
        vectors = [
            close_gap(bridge, painter.conditioner, each.modality, vector, options.gap)
            for each, vector in zip(inputs, embedded, strict=True)
        ]
        weights = [each.weight for each in inputs]
        seeds = [options.seed + number for number in range(n)] * len(good)
        pictures = paint(painter, mix(vectors, weights).repeat_interleave(n, 0), options, seeds=seeds, report=report)
    mixed = mix(embedded, weights).repeat_interleave(n, 0)
    nearest = painter.conditioner.nearest(mixed)
    metadata = {
        "bridge": str(folder),
        "model": painter.model.name,
        "prompt": options.prompt,
        "gap": options.gap,
        "command": command_line(),
        "bridgekit": installed_version(),
    }
    own = nearest if painter.conditioner.made_of == TEXT else [()] * len(nearest)
    alone = inputs[0].modality if len(inputs) == 1 else ""
    heard = bridge.heard(alone, mixed, own)
    records = []
    for file, picture, row, found, seed, known in zip(files, pictures, named, nearest, seeds, heard, strict=True):
        hits = [(hit.item, hit.similarity) for hit in found]
        write_png(picture, file, {"inputs": [*map(str, row)], "seed": seed, "nearest": hits, **asdict(known), **metadata})
        records.append(Generated(file, tuple(map(str, row)), found, seed, known))
    if sheet:
        labels = [[_short(row), str(found[0].item) if found else ""] for row, found in zip(named, nearest, strict=True)]
        write_png(contact_sheet(pictures, labels), sheet, metadata)
    left_out = {row.item: row.reason for column in columns for row in column.set_aside}
    return Generation(records, sheet, {**left_out, **set_aside}, painter.conditioner, painter.fitted)


def _check(options: GenerateOptions) -> None:
    if not options.inputs:
        raise BridgekitError("no input given", remedy="give --audio, --image or --text")
    if options.gap not in GAPS:
        raise BridgekitError(f"unknown gap method {options.gap!r}", remedy=f"use one of {', '.join(GAPS)}")
    if any(not 0 < each.weight < math.inf for each in options.inputs):
        raise BridgekitError("input weights must be positive numbers")
    if not 0 <= options.prompt_weight <= 1:
        raise BridgekitError("the prompt weight must be between 0 and 1")
    if options.n < 1:
        raise BridgekitError("the number of images must be at least 1")


def _rows(columns: Sequence[Inputs], inputs: Sequence[Input]) -> list[list[Item]]:
    """The items of each image, in the order of the inputs."""
    items = [column.items for column in columns]
    many = [column for column, each in zip(items, inputs, strict=True) if _is_many(each)]
    if len(many) > 1:
        where = ", ".join(str(column[0]) for column in many)
        raise BridgekitError(
            "only one input may be a folder, table or list", where=where, remedy="give single items for the others"
        )
    return [[column[row] if len(column) > 1 else column[0] for column in items] for row in range(max(map(len, items)))]


def _is_many(each: Input) -> bool:
    if isinstance(each.item, Blob):
        return False
    return not isinstance(each.item, str | Path) or (each.modality != TEXT and is_listing(each.item, each.modality))


def _items(bridge: Bridge, each: Input, options: GenerateOptions) -> Inputs:
    bridge.side(each.modality)
    if not isinstance(each.item, str | Path | Blob):
        found = Inputs(each.modality, each.item, [None] * len(each.item))
    elif each.modality == TEXT or isinstance(each.item, Blob):
        found = Inputs(each.modality, [each.item], [None])
    else:
        found = list_items(each.item, each.modality, columns=options.columns, outside=options.outside)
    missing = [str(item) for item in found.items if each.modality != TEXT and not isinstance(item, Blob) and not exists(item)]
    if missing or not found.items:
        raise BridgekitError("there is no such file", where=missing[0][:200] if missing else None, remedy="check the path")
    return found


def _embed(
    bridge: Bridge, inputs: Sequence[Input], rows: Sequence[Sequence[Item]], report: Report
) -> tuple[list[Tensor], dict[str, str]]:
    """Each input's embeddings, for the rows whose items are all usable, and the unusable items with their reasons."""
    columns = [list(dict.fromkeys(row[at] for row in rows)) for at in range(len(inputs))]
    found = [bridge.embed_usable(each.modality, column, report=report) for each, column in zip(inputs, columns, strict=True)]
    set_aside = {
        str(column[position]): reason
        for column, result in zip(columns, found, strict=True)
        for position, reason in result.failed.items()
    }
    vectors = []
    for at, (column, result) in enumerate(zip(columns, found, strict=True)):
        place = {item: row for row, item in enumerate(item for item in column if str(item) not in set_aside)}
        vectors.append(result.vectors[[place[row[at]] for row in rows if not any(str(item) in set_aside for item in row)]])
    if not len(vectors[0]):
        item, reason = next(iter(set_aside.items()))
        raise BridgekitError(f"no input is usable: {reason}", where=item[:200], remedy="fix or replace it")
    return vectors, set_aside


def _places(out: str | Path | None, rows: Sequence[Sequence[Item]], n: int) -> tuple[list[Path], Path | None]:
    """A file for each image, and one for the contact sheet of several: as given with --out, or named after the inputs.

    Names are unique within a run. An existing file is overwritten only if the user named it or bridgekit generated it: a photo
    may well have the same name as its clip.
    """
    if out is not None and Path(out).suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
        if Path(out).suffix.lower() != ".png":
            remedy = f"--out {Path(out).with_suffix('.png')}, or a folder"
            raise BridgekitError("images are written as PNG", where=str(out), remedy=remedy)
        if len(rows) > 1:
            raise BridgekitError(
                f"cannot write {len(rows)} images to one file", where=str(out), remedy="give a folder as --out"
            )
        if Path(out).is_dir():
            raise BridgekitError("the image cannot be written: this is a folder", where=str(out), remedy="choose another --out")
        check_writable(Path(out).parent)
        return [Path(out)], None
    folder = Path(out) if out is not None else Path() if len(rows) == 1 else Path("pictures")
    check_writable(folder)
    taken: set[str] = set()

    def free(base: str) -> Path:
        name, again = base, 2
        while name.casefold() in taken or not made_here(folder / f"{name}.png"):
            name, again = f"{base}-{again}", again + 1
        taken.add(name.casefold())
        return folder / f"{name}.png"

    sheet = free("sheet") if len(rows) > 1 else None
    return [free(_short(row) + (f"-{number % n}" if n > 1 else "")) for number, row in enumerate(rows)], sheet


def _short(row: Sequence[Item]) -> str:
    """A file name for inputs: the stems of files, the first words of texts, the last part of other names."""

    def named(item: Item) -> str:
        if isinstance(item, Blob):
            return Path(item.label.rpartition(", ")[2]).stem
        return Path(item).stem if exists(item) and Path(item).is_file() else str(item)[:60]

    names = map(named, row)
    name = " + ".join("".join(c if c.isalnum() or c in " -_.,'" else "_" for c in name).strip(" .") or "_" for name in names)
    return name[:80].encode()[:NAME_BYTES].decode(errors="ignore").strip(" .")
