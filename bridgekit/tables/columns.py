"""Which column of a table holds which modality: the one with its name, the one the user names, or the one obvious guess."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence

from bridgekit.encoders import TEXT
from bridgekit.errors import BridgekitError
from bridgekit.pairs import EXTENSIONS
from bridgekit.plain import plain

#: Names that columns of public data sets have, in lower case with `_` for spaces and dashes.
GUESSES = {
    "image": {"images", "img", "picture", "photo", "image_path", "image_file", "image_name", "img_path", *EXTENSIONS["image"]},
    "audio": {"sound", "clip", "speech", "recording", "audio_path", "audio_file", "audio_filename", "wav_path"}
    | {*EXTENSIONS["audio"]},
    TEXT: {
        "texts",
        "caption",
        "captions",
        "sentence",
        "sentences",
        "transcript",
        "transcription",
        "description",
        "prompt",
        "txt",
    }
    | {"label", "category", "class", "class_name", "title"},
}
#: The types that Hugging Face's `datasets` gives to columns of files.
FEATURES = {"image": "Image", "audio": "Audio"}
#: Columns that are no modality.
RESERVED = ("split", "group")
#: Columns of paths of some modality, as `imagefolder` and `audiofolder` name it.
FILES = {"file_name", "filename", "file", "path", "filepath", "file_path"}
SEARCHED, SHOWN = 1_000, 20  # column names that are searched for a close match, and listed in a message


def find_column(
    modality: str,
    names: Sequence[str],
    given: Mapping[str, str],
    features: Mapping[str, str],
    files: Mapping[str, str | None] | None = None,
) -> str | None:
    """The name of the column with a modality's items, or None.

    Arguments:
        modality: the modality.
        names: the table's columns.
        given: modality to the column that the user named.
        features: column to its type in Hugging Face's `datasets`.
        files: columns with names such as `file_name` or `path` to the modality of the files that they refer to.
    """
    if modality in given:
        several = named_columns(given[modality], names)
        return given[modality] if len(several) > 1 else next(iter(several), None)
    own = _same_name(modality, names)
    if own is not None:
        return own
    free = [name for name in names if _canonical(name) not in RESERVED and name not in given.values()]
    typed = [name for name in free if modality in FEATURES and features.get(name) == FEATURES[modality]]
    guesses = typed or [name for name in free if _canonical(name) in GUESSES.get(modality, ())]
    guesses = guesses or [name for name in free if (files or {}).get(name) == modality]
    return guesses[0] if len(guesses) == 1 else None


def named_columns(given: str, names: Sequence[str]) -> list[str]:
    """The columns that the user named: one, or several with a text of the row in each: `caption_1,caption_2`, `caption_*`."""
    if (one := _same_name(given, names)) is not None:
        return [one]
    found = [fnmatch.filter(names, part) if "*" in part else [_same_name(part, names)] for part in given.split(",")]
    return [] if any(None in part for part in found) else [name for part in found for name in part if name]


def _same_name(wanted: str, names: Sequence[str]) -> str | None:
    if wanted in names:
        return wanted
    same = [name for name in names if name.casefold() == wanted.casefold()]
    return same[0] if len(same) == 1 else None


def _canonical(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def check_column(modality: str, name: str | None, names: Sequence[str], given: Mapping[str, str], where: str) -> str:
    """The column's name.

    Raises:
        BridgekitError: there is no such column, or more than one. The message names the column that was probably meant.
    """
    wanted = given.get(modality, modality)
    if name is not None:
        if list(names).count(name) > 1:
            raise BridgekitError(f"the table has several columns named `{name}`", where=where, remedy="rename all but one")
        return name
    lowered = {each.lower(): each for each in names[:SEARCHED] if len(each) < 100}
    close = difflib.get_close_matches(wanted.lower(), lowered, n=1, cutoff=0.75)
    fitting = [each for each in names if _canonical(each) in GUESSES.get(modality, ())]
    if len(names) == 1 and any(mark in names[0] for mark in ",;\t|"):
        remedy = "separate the cells with commas (.csv) or tabs (.tsv)"
    elif any(map(_looks_like_path, names)):
        remedy = (
            f"the first row must name the columns: add a header, for example {modality if modality != TEXT else 'image'},{TEXT}"
        )
    elif any("\0" in each for each in names):
        remedy = "save the table as UTF-8: it has NUL bytes, so it may be UTF-16"
    elif close or fitting:
        meant = fitting[0] if fitting else lowered[close[0]]
        remedy = f"name the column with the {modality} items, for example {_option(modality, plain(meant))}"
    else:
        remedy = f"name the column with the {modality} items: {_option(modality, 'NAME')}"
    raise BridgekitError(
        f"the table has no column `{wanted}`; its columns are {listed_columns(names)}", where=where, remedy=remedy
    )


def _option(modality: str, name: str) -> str:
    return f'--column {modality}={name} (in Python: columns={{"{modality}": "{name}"}})'


def check_given(given: Mapping[str, str], modalities: Sequence[str], where: str) -> None:
    """Raise BridgekitError for a named column of something that is no modality: it would be ignored."""
    known = {*EXTENSIONS, TEXT, *modalities}
    for modality, name in given.items():
        if modality not in known:
            swapped = f"did you mean {name}={modality}? " if name in known else ""
            remedy = f"{swapped}write MODALITY=COLUMN; the modalities are {', '.join(sorted(known))}"
            raise BridgekitError(f"a column was named for {modality!r}, which is no modality here", where=where, remedy=remedy)


def _looks_like_path(name: str) -> bool:
    ending = name.rpartition(".")[2].lower()
    return "." in name and any(ending in endings for endings in EXTENSIONS.values())


def listed_columns(names: Sequence[str]) -> str:
    """Column names for a message: at most `SHOWN`, with long ones cut."""
    found = ", ".join(f"`{plain(name)[:60]}`" for name in names[:SHOWN])
    return found + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")
