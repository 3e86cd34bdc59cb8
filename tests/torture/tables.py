"""Tables and bridges broken at random: commands must end in a result or an error message, within limits of time and memory."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.torture.command import (
    Ended,
    call,
    call_on_terminal,
    fault,
    fault_for_people,
    inside,
    peak,
    reasons,
    shape,
    short,
)
from tests.torture.outcome import Outcome
from tests.torture.strangers import Ground, ground_for, write_csv

#: Allowed increase of this process's peak memory, in bytes, after two encoders were opened.
MEMORY = 512 << 20
#: Control characters, bidirectional overrides, markup.
STRANGE = (
    "\x1b]0;owned\x07",
    "\x1b[2J",
    "\x9b31m",
    "\u202egnp.exe",
    "\r\n",
    "\0",
    "\u2028",
    "[/red]",
    "[link=file:///]x",
    "\ufeff",
    "\x1b]52;c;b3duZWQ=\x07",
    "x" * 1_000_000,
)
HEADER = ("image", "text", "split")
Rows = list[tuple[str, ...]]


def run(count: int, seed: int) -> Outcome:
    """Try `count` broken tables and bridges, half of each."""
    failures, messages, kinds, ends = [], dict[str, str](), Counter[str](), Counter[str]()
    with ground_for("tables ü") as ground:
        place = ground.folder.parent
        with inside(ground.folder):
            for arguments in _whole():
                assert not fault(call([*arguments, "--json"])), "the unbroken files must work"
        before, slowest = peak(), 0.0
        for number in range(count):
            rng = random.Random(f"{seed}-{number}")
            broken = _broken_bridge if number % 2 else _broken_table
            folder = place / str(number)
            kind, arguments = broken(ground, folder, number // 2, rng)
            for_people = rng.random() < 0.5
            with inside(folder):
                ended = call_on_terminal(arguments) if for_people else call([*arguments, "--json"])
            kinds[kind.partition(":")[0]] += 1
            codes = (0, 1, 2) if arguments[0] == "check" else (0, 2)  # `check` ends with 1 if it finds errors
            wrong = fault_for_people(ended, codes) if for_people else fault(ended, codes) or _unsound(ended)
            if wrong:
                failures.append(f"{kind}, seed {seed}-{number}: {' '.join(map(str, arguments))[:200]}: {wrong}")
            elif for_people:
                ends["a page of text" if ended.code == 0 else "a message for people"] += 1
            else:
                ends["a result" if ended.code == 0 else "a message"] += 1
                found = [(shape(ended), ended.err.strip())] if ended.code else [(short(why), why) for why in reasons(ended)]
                for message, example in found:
                    messages.setdefault(message, example)
            slowest = max(slowest, ended.seconds)
            _remove(folder)
        grown = peak() - before
    if grown > MEMORY:
        failures.append(f"memory grew by {grown / 1e6:,.0f} MB, over {MEMORY / 1e6:,.0f} MB")
    figures = {
        "broken tables": f"{(count + 1) // 2}",
        "broken bridges": f"{count // 2}",
        **{f"ended in {end}": f"{number}" for end, number in ends.items()},
        "kinds of damage": f"{len(kinds)}",
        "longest CPU time": f"{slowest:.1f} s",
        "increase of peak memory": f"{max(0, grown) / 1e6:,.0f} MB (limit {MEMORY / 1e6:,.0f} MB)",
    }
    return Outcome("broken tables and bridges", count, count - len(failures), tuple(failures), figures, messages)


def _whole() -> Iterator[list[object]]:
    yield ["encode", "--pairs", "pairs.csv", "--a", "image", "--b", "text"]
    yield ["info", "bridge"]
    yield ["search", "a red apple", "--bridge", "bridge"]


def _unsound(ended: Ended) -> str:
    """A bridge that loads must give valid similarities."""
    result = json.loads(ended.out)
    found = [hit for query in result for hit in query.get("found", [])] if isinstance(result, list) else []
    if all(-1.001 <= hit["similarity"] <= 1.001 for hit in found):
        return ""
    return f"a hit has a similarity of {found[0]['similarity']}"


def _remove(folder: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(folder)


# ---- tables


def _broken_table(ground: Ground, folder: Path, number: int, rng: random.Random) -> tuple[str, list[object]]:
    """Write a broken table and its images; returns the kind of damage and a command that reads the table."""
    folder.mkdir()
    if rng.random() < 0.1:
        (folder / "pictures").symlink_to(ground.folder / "pictures")
    else:
        shutil.copytree(ground.folder / "pictures", folder / "pictures")
    kinds = [*ON_BYTES, *ON_ROWS, *WHOLE_TABLES]
    kind = kinds[number % len(kinds)]
    suffix = rng.choice([".csv", ".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"])
    path = folder / f"table{suffix}"
    if kind in WHOLE_TABLES:
        path = WHOLE_TABLES[kind](folder, ground.rows, rng)
    elif kind in ON_ROWS:
        header, rows = ON_ROWS[kind](list(HEADER), [list(row) for row in ground.rows], rng, folder)
        _write(path, header, rows)
    else:
        _write(path, list(HEADER), [list(row) for row in ground.rows])
        path.write_bytes(ON_BYTES[kind](path.read_bytes(), rng))
    bridge = ground.folder / "bridge"
    verbs: list[list[object]] = [
        ["encode", "--pairs", path.name, "--a", "image", "--b", "text"],
        ["encode", "--pairs", path.name],
        ["subset", "--pairs", path.name, "-k", 5, "--out", "chosen.csv"],
        ["search", "a red apple", "--bridge", bridge, "--among", path.name, "--to", "image"],
        ["search", "a red apple", "--bridge", bridge, "--among", path.name, "--to", "text"],
        ["eval", bridge, "--pairs", path.name],
        ["eval", bridge, "--pairs", path.name, "--zero-shot"],
        ["align", "--pairs", path.name, "--a", "image", "--b", "text", "--out", bridge],
        ["bind", bridge, "--add", "image", "--pairs", path.name],
        ["check", path.name],
        ["embed", path.name, "--modality", "text", "--bridge", bridge, "--out", "embedded.parquet"],
        ["index", path.name, "--bridge", bridge, "--out", "made.index"],
        ["align", "--pairs", ground.folder / "pairs.csv", "--unpaired", path.name, "--out", bridge],
    ]
    return f"table {kind}: {suffix}", rng.choice(verbs)


def _write(path: Path, header: list[Any], rows: list[list[Any]]) -> None:
    """Write rows in the format of the path's extension; cells may be anything."""
    if path.suffix == ".parquet":
        columns = {str(name): [row[at] if at < len(row) else None for row in rows] for at, name in enumerate(header)}
        arrays = {}
        for name, cells in columns.items():
            try:
                arrays[_sound(name)] = pa.array(cells)
            except (pa.ArrowException, UnicodeError, OverflowError):
                arrays[_sound(name)] = pa.array([None if cell is None else _sound(str(cell)) for cell in cells])
        pq.write_table(pa.table(arrays), path)
    elif path.suffix in (".jsonl", ".ndjson"):
        lines = [json.dumps(dict(zip(map(str, header), row, strict=False))) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        lines = [mark.join('"' + str(cell).replace('"', '""') + '"' for cell in row) for row in [header, *rows]]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")


def _sound(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _spliced(data: bytes, rng: random.Random, make: Callable[[int], bytes], times: int = 4) -> bytes:
    for _ in range(rng.randint(1, times)):
        at = rng.randrange(len(data) + 1)
        data = data[:at] + make(at) + data[at:]
    return data


def _flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 2, 8, 60])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _without_span(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.randint(1, 80) :]


def _recoded(data: bytes, encoding: str) -> bytes:
    return data.decode("utf-8", "replace").encode(encoding, "replace")


#: Changes to the bytes of a table.
ON_BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flipped bits": _flipped,
    "cut short": lambda data, rng: data[: rng.randrange(len(data))],
    "a span lost": _without_span,
    "random bytes": lambda data, rng: _spliced(data, rng, lambda at: rng.randbytes(rng.randint(1, 20))),
    "NUL bytes": lambda data, rng: _spliced(data, rng, lambda at: b"\0" * rng.randint(1, 5)),
    "stray quotes": lambda data, rng: _spliced(data, rng, lambda at: rng.choice([b'"', b'""', b"'", b'",'])),
    "stray separators": lambda data, rng: _spliced(data, rng, lambda at: rng.choice([b",", b"\t", b"\n", b"\r", b";"])),
    "strange characters": lambda data, rng: _spliced(data, rng, lambda at: rng.choice(STRANGE).encode()),
    "a byte order mark": lambda data, rng: b"\xef\xbb\xbf" * rng.randint(1, 3) + data,
    "UTF-16": lambda data, rng: _recoded(data, rng.choice(["utf-16", "utf-16-le", "utf-16-be"])),
    "UTF-32": lambda data, rng: _recoded(data, "utf-32"),
    "Latin-1": lambda data, rng: _recoded(data, "latin-1"),
    "other line ends": lambda data, rng: data.replace(b"\n", rng.choice([b"\r", b"\r\n", b"\n\r", b"\x0b", b"\x85"])),
    "no line ends": lambda data, rng: data.replace(b"\n", b" "),
    "a line of 1 MB": lambda data, rng: _spliced(data, rng, lambda at: b"x" * (1 << 20), 1),
    "3 MB of blanks": lambda data, rng: _spliced(data, rng, lambda at: b" " * (3 << 20), 1),
    "only zeros": lambda data, rng: bytes(len(data)),
    "only noise": lambda data, rng: rng.randbytes(len(data)),
    "nothing": lambda data, rng: b"",
    "twice": lambda data, rng: data + data,
    "backwards": lambda data, rng: data[::-1],
}

Changed = tuple[list[Any], list[list[Any]]]


def _cells(value: Callable[[random.Random], Any], column: int) -> Callable[..., Changed]:
    """Replace some cells of a column."""

    def change(header: list[Any], rows: list[list[Any]], rng: random.Random, folder: Path) -> Changed:
        for at in rng.sample(range(len(rows)), rng.choice([1, 3, len(rows)])):
            rows[at][column] = value(rng)
        return header, rows

    return change


def _ragged(header: list[Any], rows: list[list[Any]], rng: random.Random, folder: Path) -> Changed:
    for at in rng.sample(range(len(rows)), 3):
        rows[at] = rows[at][: rng.randint(0, 2)] if rng.random() < 0.5 else [*rows[at], *["more"] * rng.randint(1, 5)]
    return header, rows


def _other_header(header: list[Any], rows: list[list[Any]], rng: random.Random, folder: Path) -> Changed:
    choices: list[list[Any]] = [
        ["image", "text", "text"],
        ["image", "image", "image"],
        ["Image", "TEXT", "Split"],
        [" image ", "text ", "split"],
        ["", "", ""],
        ["pictures", "captions", "x"],
        ["image", "text" * 50_000, "split"],
        [rng.choice(STRANGE), "text", "split"],
        ["image", rng.choice(STRANGE) + "text", rng.choice(STRANGE)],
        ["image;text;split"],
        [1, 2, 3],
        ["audio", "sensor", "group"],
        ["split", "group", "text"],
    ]
    return rng.choice(choices), rows


def _no_header(header: list[Any], rows: list[list[Any]], rng: random.Random, folder: Path) -> Changed:
    return rows[0], rows[1:]


def _no_rows(header: list[Any], rows: list[list[Any]], rng: random.Random, folder: Path) -> Changed:
    return header, []


def _many_columns(header: list[Any], rows: list[list[Any]], rng: random.Random, folder: Path) -> Changed:
    more = [f"column {number}" for number in range(rng.choice([300, 3_000]))]
    return ([*header, *more], [[*row, *[""] * len(more)] for row in rows])


def _linked_away(header: list[Any], rows: list[list[Any]], rng: random.Random, folder: Path) -> Changed:
    for number, target in enumerate(["/etc/passwd", "/dev/zero", "/proc/self/mem", "loop", str(folder.parent / "ground")]):
        name = "loop" if target == "loop" else f"link{number}.png"
        (folder / name).symlink_to(target)
        rows[number][0] = rng.choice([name, f"{name}/x.png"])
    os.mkfifo(folder / "pipe.png")
    rows[6][0] = "pipe.png"
    return header, rows


def _strange_names(header: list[Any], rows: list[list[Any]], rng: random.Random, folder: Path) -> Changed:
    for at, name in enumerate(("a\x1b[31mb.png", "a\nb.png", "a\u202eb.png", "caf\u00e9.png", "[red].png", "'; rm -rf x.png")):
        shutil.copyfile(folder / "pictures" / "1.png", folder / name)
        rows[at][0] = unicodedata.normalize("NFD", name) if rng.random() < 0.3 else name
    return header, rows


def _nested(depth: int) -> Any:
    value: Any = "x"
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


PATHS = ("../pairs.csv", "/etc/passwd", "pictures/../../ground/pictures/0.png", "/dev/zero", "/proc/self/environ", "~/x.png")
FILES = ("", ".", "..", "/", "pictures", "gone.png", "pictures/0.png/x", "x" * 300, "x/" * 3_000, "C:\\x.png", "http://x/y.png")
TYPES = (1, -1.5, True, None, [], ["a"], {}, {"a": 1}, 10**30, float("nan"), float("inf"), 1e308, "\ud800", "\0")
TEXTS = ("", " ", "\t", "\0", "x" * (2 << 20), "x" * (17 << 20), "\u202e", "🦴" * 1000, "=cmd()", "<script>alert(1)</script>")

#: Changes to the rows of a table before it is written.
ON_ROWS: dict[str, Callable[..., Changed]] = {
    "ragged rows": _ragged,
    "another header": _other_header,
    "no header": _no_header,
    "no rows": _no_rows,
    "many columns": _many_columns,
    "paths that lead away": _cells(lambda rng: rng.choice(PATHS), 0),
    "paths of no file": _cells(lambda rng: rng.choice(FILES), 0),
    "strange characters in paths": _cells(lambda rng: f"pictures/{rng.choice(STRANGE)}.png", 0),
    "strange characters in texts": _cells(lambda rng: rng.choice(STRANGE), 1),
    "strange characters in splits": _cells(lambda rng: rng.choice(STRANGE), 2),
    "other types of paths": _cells(lambda rng: rng.choice(TYPES), 0),
    "other types of texts": _cells(lambda rng: rng.choice(TYPES), 1),
    "other types of splits": _cells(lambda rng: rng.choice(TYPES), 2),
    "deep cells": _cells(lambda rng: _nested(rng.choice([10, 60, 70, 300])), 1),
    "odd texts": _cells(lambda rng: rng.choice(TEXTS), 1),
    "odd splits": _cells(lambda rng: rng.choice(["", "train", "TEST", "x" * 100_000, "None", "0"]), 2),
    "links and pipes": _linked_away,
    "strange names of files": _strange_names,
}


def _named(name: str) -> Callable[[Path, list[tuple[str, str, str]], random.Random], Path]:
    """A valid table under another name."""
    return lambda folder, rows, rng: write_csv(folder / name, [HEADER, *rows])


def _pipe(folder: Path, rows: list[tuple[str, str, str]], rng: random.Random) -> Path:
    path = folder / f"table{rng.choice(['.csv', '.jsonl', '.parquet', '.txt'])}"
    os.mkfifo(path)
    return path


def _link(folder: Path, rows: list[tuple[str, str, str]], rng: random.Random) -> Path:
    path = folder / f"table{rng.choice(['.csv', '.jsonl', '.parquet'])}"
    path.symlink_to(rng.choice(["/dev/zero", "/etc/passwd", path.name, "/proc/self/maps", "nowhere", "/dev/stdin"]))
    return path


def _json_lines(folder: Path, rows: list[tuple[str, str, str]], rng: random.Random) -> Path:
    lines = [json.dumps(dict(zip(HEADER, row, strict=True))) for row in rows]
    odd = [
        "[" * rng.choice([65, 100_000]),
        '{"a":' * rng.choice([65, 50_000]),
        '{"image": "x", "image": "y", "text": "z"}',
        '{"text": ' + "9" * 5_000 + "}",
        '{"text": 1e999, "image": NaN}',
        '{"text": "' + '\\"' * 200_000,
        '"' * 100_001,
        "null",
        '{"text": "\\ud800", "image": "\\udcff.png"}',
        '{"__proto__": {"text": "x"}}',
        "\ufeff{}",
    ]
    lines.insert(rng.randrange(len(lines)), rng.choice(odd))
    path = folder / "table.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _all_other_keys(folder: Path, rows: list[tuple[str, str, str]], rng: random.Random) -> Path:
    lines = [json.dumps({**dict(zip(HEADER, row, strict=True)), f"key{at}": at}) for at, row in enumerate(rows * 1_500)]
    path = folder / "table.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _typed_parquet(folder: Path, rows: list[tuple[str, str, str]], rng: random.Random) -> Path:
    images, texts, _ = zip(*rows, strict=True)
    columns: list[Any] = [
        pa.array([[text] for text in texts]),
        pa.array([{"a": text} for text in texts]),
        pa.array([text.encode() for text in texts]),
        pa.array(range(len(texts)), pa.timestamp("ns")),
        pa.array([text.encode() + b"\xff" for text in texts], pa.binary()),
        pa.array(texts).dictionary_encode(),
        pa.array([None] * len(texts), pa.null()),
        pa.array([float("nan")] * len(texts)),
        pa.array([2**63 - 1] * len(texts)),
    ]
    table = pa.table({"image": pa.array(images), "text": rng.choice(columns), "split": rng.choice(columns)})
    pq.write_table(table, folder / "table.parquet")
    return folder / "table.parquet"


def _damaged(data: bytes, rng: random.Random) -> bytes:
    """A file with flipped bytes, cut short, or with a piece of it twice."""
    at = rng.randrange(len(data))
    flipped = bytearray(data)
    for _ in range(rng.choice([1, 3, 30])):
        flipped[rng.randrange(len(data))] = rng.randrange(256)
    return rng.choice([bytes(flipped), data[:at], data[: at // 2] + data[at // 3 :]])


def _files_inside(folder: Path, rows: list[tuple[str, str, str]], rng: random.Random) -> Path:
    """Parquet or Arrow with pictures in it, which are damaged, missing or elsewhere, and then the table is damaged itself."""
    images, texts, _ = zip(*rows, strict=True)
    cells = [
        rng.choice(
            [
                {"bytes": (folder / image).read_bytes(), "path": rng.choice([None, "a.png", "../x\x1b[2J.png", "\0"])},
                {"bytes": _damaged((folder / image).read_bytes(), rng), "path": None},
                {
                    "bytes": None,
                    "path": rng.choice(
                        [image, "../ground/pairs.csv", "/etc/passwd", "", "\udcff".encode("utf-8", "replace").decode()]
                    ),
                },
                {"bytes": b"", "path": image},
                None,
            ]
        )
        for image in images
    ]
    captions = [[text] * rng.choice([0, 1, 1, 2]) for text in texts]
    table = pa.table({"image": cells, "text": rng.choice([captions, [*texts]])})
    features = rng.choice(
        ["{", "[]", '{"info": {"features": {"image": 3, "text": {"_type": "ClassLabel", "names": 7}}}}', "{}"]
    )
    table = table.replace_schema_metadata({"huggingface": features})
    path = folder / f"table{rng.choice(['.parquet', '.arrow'])}"
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=rng.choice([1, 7, 1000]))
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=rng.choice([1, 7, 1000]))
    if rng.random() < 0.5:
        path.write_bytes(_damaged(path.read_bytes(), rng))
    return path


def _json_array(folder: Path, rows: list[tuple[str, str, str]], rng: random.Random) -> Path:
    odd = rng.choice(
        [3, None, [], {"image": {}}, {"image": [], "text": [[]]}, {"text": {"raw": 1}}, {"image": "\ud800", "text": "x"}]
    )
    values: list[Any] = [{"image": image, "text": [text, {"raw": text}]} for image, text, _ in rows]
    values.insert(rng.randrange(len(values)), odd)
    document = rng.choice([values, {"a": values}, {"a": values, "b": values}, {"a": 1}, [values]])
    text = json.dumps(document)
    (folder / "table.json").write_text(text if rng.random() < 0.7 else text[: rng.randrange(len(text))])
    return folder / "table.json"


def _saved(folder: Path, rows: list[tuple[str, str, str]], rng: random.Random) -> Path:
    """What `save_to_disk` writes, with names that lead elsewhere, or damaged."""
    place = folder / "saved"
    place.mkdir()
    name = rng.choice(["data.arrow", "../ground/pairs.csv", "/dev/zero", "", "..", "a\0b", 7, {"filename": "x"}])
    (place / "state.json").write_text(json.dumps({"_data_files": rng.choice([[{"filename": name}], [name], name, None])}))
    (place / "dataset_info.json").write_text("{}")
    table = pa.table({"image": [(folder / image).read_bytes() for image, _, _ in rows], "text": [text for _, text, _ in rows]})
    with pa.OSFile(str(place / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    if rng.random() < 0.3:
        (place / "data.arrow").write_bytes(_damaged((place / "data.arrow").read_bytes(), rng))
    return place


def _beside(folder: Path, rows: list[tuple[str, str, str]], rng: random.Random) -> Path:
    """Texts beside pictures: not UTF-8, empty, vast, folders or links."""
    place = folder / "beside"
    place.mkdir()
    for at, (image, text, _) in enumerate(rows):
        shutil.copyfile(folder / image, place / f"{at}.png")
        beside = place / f"{at}.txt"
        kind = rng.randrange(8)
        if kind == 0:
            beside.write_bytes(b"\xff\xfe\0")
        elif kind == 1:
            beside.symlink_to("/etc/passwd")
        elif kind == 2:
            beside.mkdir()
        elif kind == 3:
            beside.write_text("x" * (2 << 20))
        elif kind == 4:
            os.mkfifo(beside)
        else:
            beside.write_text(text, encoding="utf-8", errors="replace")
    return place


def _class_folders(folder: Path, rows: list[tuple[str, str, str]], rng: random.Random) -> Path:
    for at, name in enumerate(["red apple", "dog\x1b[31m", "\u202etac", "-rf", "[/x]", "\udcff"]):
        (folder / "classes" / name).mkdir(parents=True)
        shutil.copyfile(folder / "pictures" / f"{at}.png", folder / "classes" / name / f"{at}.png")
    (folder / "classes" / "out").symlink_to(folder.parent / "ground" / "pictures")
    (folder / "classes" / "loop").symlink_to("loop")
    os.mkfifo(folder / "classes" / "red apple" / "pipe.png")
    return folder / "classes"


#: Tables written from scratch.
WHOLE_TABLES: dict[str, Callable[[Path, list[tuple[str, str, str]], random.Random], Path]] = {
    "as .xlsx": _named("table.xlsx"),
    "without an ending": _named("table"),
    "a CSV as .jsonl": _named("table.jsonl"),
    "a CSV as .parquet": _named("table.parquet"),
    "a CSV as .txt": _named("table.txt"),
    "a named pipe": _pipe,
    "a link to something else": _link,
    "odd rows of JSON": _json_lines,
    "rows with keys of their own": _all_other_keys,
    "Parquet of other types": _typed_parquet,
    "files inside a table": _files_inside,
    "a JSON array": _json_array,
    "saved by datasets": _saved,
    "texts beside files": _beside,
    "class folders": _class_folders,
    "missing": lambda folder, rows, rng: folder / rng.choice(["gone.csv", "x" * 300, "a\nb.csv", "starter:gone", "\x1b[31m"]),
}


# ---- bridges


def _broken_bridge(ground: Ground, folder: Path, number: int, rng: random.Random) -> tuple[str, list[object]]:
    """Copy the bridge and its table and break the bridge; returns the kind of damage and a command that uses the bridge."""
    ground.copy(folder)
    bridge = folder / "bridge"
    files = [*BRIDGE_FILES, *ADAPTERS, *HISTORIES]
    if number % 3:
        kind = _change_field(bridge, number, rng)
    else:
        name = files[number // 3 % len(files)]
        kind = f"bridge {name}"
        {**BRIDGE_FILES, **ADAPTERS, **HISTORIES}[name](bridge, rng)
    verbs: list[list[object]] = [
        ["info", "bridge"],
        ["eval", "bridge"],
        ["eval", "bridge", "--zero-shot"],
        ["search", "a red apple", "--bridge", "bridge"],
        ["search", "a red apple", "--bridge", "bridge", "--among", "pairs.csv", "--to", "image"],
        ["embed", "a red apple", "--bridge", "bridge"],
        ["bind", "bridge", "--add", "image", "--pairs", "pairs.csv"],
        ["align", "--a", "image", "--b", "text", "--pairs", "pairs.csv", "--out", "bridge"],
    ]
    return kind, rng.choice(verbs)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to each field of a JSON document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield (*path, key)
        yield from _places(each, (*path, key))


#: Values for a field. `removed` and `renamed` are done to the field itself.
VALUES: tuple[Any, ...] = (
    "removed",
    "renamed",
    None,
    True,
    False,
    0,
    1,
    -1,
    2.5,
    10**12,
    10**38,
    10**200,
    float("nan"),
    float("inf"),
    -1e308,
    "",
    "x",
    "x" * 5_000,
    "../../x",
    "/etc/passwd",
    "\x1b]0;owned\x07",
    "\ud800",
    "\u202e",
    [],
    {},
    [1],
    {"x": {}},
    _nested(40),
    _nested(80),
    [0] * 100_000,
)


def _change_field(bridge: Path, number: int, rng: random.Random) -> str:
    """Change one field of bridge.json. Consecutive numbers go through all fields in an order independent of the seed."""
    file = bridge / "bridge.json"
    metadata = json.loads(file.read_text(encoding="utf-8"))
    places = sorted(_places(metadata), key=lambda place: hashlib.sha256(str(place).encode()).digest())
    place = places[(number // 3 * 2 + number % 3 - 1) % len(places)]
    value = copy.deepcopy(rng.choice(VALUES))
    owner = metadata
    for key in place[:-1]:
        owner = owner[key]
    if value == "removed":
        del owner[place[-1]]
    elif value == "renamed" and isinstance(owner, dict):
        owner[rng.choice(["\x1b[31m", "../x", "x" * 300, "", "text"])] = owner.pop(place[-1])
    else:
        owner[place[-1]] = value
    file.write_text(json.dumps(metadata), encoding="utf-8")
    return f"bridge field: {'.'.join(map(str, place))}"


def _rewritten(name: str, change: Callable[[bytes, random.Random], bytes]) -> Callable[[Path, random.Random], None]:
    """Change the bytes of a file."""

    def rewrite(bridge: Path, rng: random.Random) -> None:
        (bridge / name).write_bytes(change((bridge / name).read_bytes(), rng))

    return rewrite


def _not_a_file(name: str) -> Callable[[Path, random.Random], None]:
    def put(bridge: Path, rng: random.Random) -> None:
        file = bridge / name
        file.unlink()
        kind = rng.randrange(6)
        if kind == 0:
            os.mkfifo(file)
        elif kind == 1:
            file.mkdir()
        elif kind < 5:
            file.symlink_to(["/dev/zero", "/etc/passwd", file.name][kind - 2])

    return put


def _vast(name: str) -> Callable[[Path, random.Random], None]:
    """A sparse file of 100 GB."""

    def grow(bridge: Path, rng: random.Random) -> None:
        os.truncate(bridge / name, 100 << 30)

    return grow


BRIDGE_FILES: dict[str, Callable[[Path, random.Random], None]] = {
    f"bridge.json, {kind}": _rewritten("bridge.json", ON_BYTES[kind])
    for kind in ("flipped bits", "cut short", "a span lost", "NUL bytes", "UTF-16", "a byte order mark", "twice", "nothing")
} | {
    "bridge.json, 100,000 brackets": _rewritten("bridge.json", lambda data, rng: b"[" * 100_000),
    "bridge.json, a key twice": _rewritten("bridge.json", lambda data, rng: b'{"format": 1, ' + data.lstrip()[1:]),
    "bridge.json, 17 MB of blanks": _rewritten("bridge.json", lambda data, rng: data + b" " * (17 << 20)),
    "bridge.json, no file": _not_a_file("bridge.json"),
    "bridge.json, vast": _vast("bridge.json"),
    "folder, links": lambda bridge, rng: (bridge / rng.choice(["x.png", "conditioners"])).symlink_to("/etc"),
}


def _resigned(change: Callable[[bytes, random.Random], bytes]) -> Callable[[Path, random.Random], None]:
    """Change the adapters and their SHA-256 in bridge.json, so that only checking the tensors reveals it."""

    def rewrite(bridge: Path, rng: random.Random) -> None:
        data = change((bridge / "adapters.safetensors").read_bytes(), rng)
        (bridge / "adapters.safetensors").write_bytes(data)
        metadata = json.loads((bridge / "bridge.json").read_text(encoding="utf-8"))
        metadata["adapters_sha256"] = hashlib.sha256(data).hexdigest()
        (bridge / "bridge.json").write_text(json.dumps(metadata), encoding="utf-8")

    return rewrite


def _other_list(change: Callable[[dict[str, Any], random.Random], object]) -> Callable[[bytes, random.Random], bytes]:
    """Change the safetensors header, with its correct length; the data stays."""

    def rewrite(data: bytes, rng: random.Random) -> bytes:
        length = int.from_bytes(data[:8], "little")
        listed = json.loads(data[8 : 8 + length])
        changed = json.dumps(change(listed, rng) or listed).encode()
        return len(changed).to_bytes(8, "little") + changed + data[8 + length :]

    return rewrite


def _some(listed: dict[str, Any], rng: random.Random) -> str:
    return rng.choice([name for name in listed if name != "__metadata__"])


def _set(field: str, values: tuple[Any, ...]) -> Callable[[dict[str, Any], random.Random], None]:
    def change(listed: dict[str, Any], rng: random.Random) -> None:
        listed[_some(listed, rng)][field] = rng.choice(values)

    return change


def _not_finite(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    length = 8 + int.from_bytes(data[:8], "little")
    at = length + 4 * rng.randrange((len(data) - length) // 4)
    changed[at : at + 4] = rng.choice([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff"])
    return bytes(changed)


SHAPES = ([], [0], [-1], [1 << 40], [1 << 62, 1 << 62], ["x"], None, [384, 384, 384], 2.5, [True])
OFFSETS = ([0, 0], [0, 1 << 60], [-8, 0], [8, 4], [], None, "x", [0, 4])
ADAPTERS: dict[str, Callable[[Path, random.Random], None]] = {
    "adapters, flipped bits": _rewritten("adapters.safetensors", _flipped),
    "adapters, flipped bits signed": _resigned(_flipped),
    "adapters, cut short": _resigned(lambda data, rng: data[: rng.randrange(len(data))]),
    "adapters, more behind": _resigned(lambda data, rng: data + rng.randbytes(rng.choice([1, 4, 100_000]))),
    "adapters, a length that lies": _resigned(
        lambda data, rng: rng.choice([0, 1, 7, 1 << 20, 1 << 40, (1 << 64) - 1]).to_bytes(8, "little") + data[8:]
    ),
    "adapters, other shapes": _resigned(_other_list(_set("shape", SHAPES))),
    "adapters, other types": _resigned(_other_list(_set("dtype", ("F16", "F64", "I64", "BF16", "X", None, 7)))),
    "adapters, other offsets": _resigned(_other_list(_set("data_offsets", OFFSETS))),
    "adapters, one tensor less": _resigned(_other_list(lambda listed, rng: listed.pop(_some(listed, rng)) and None)),
    "adapters, one tensor more": _resigned(
        _other_list(lambda listed, rng: listed.update({"x\x1b[31m": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}))
    ),
    "adapters, another list": _resigned(_other_list(lambda listed, rng: rng.choice([[], 1, "x", _nested(80), {}, {"x": 1}]))),
    "adapters, not finite": _resigned(_not_finite),
    "adapters, nothing": _resigned(lambda data, rng: b""),
    "adapters, no file": _not_a_file("adapters.safetensors"),
    "adapters, vast": _vast("adapters.safetensors"),
}
LINES = (
    b"[]",
    b"null",
    b'{"loss": NaN}',
    b'{"loss": "x"}',
    b"[" * 100_000,
    b"{" + b" " * 70_000 + b"}",
    b"\xff",
    b'{"a":1e999}',
)
HISTORIES: dict[str, Callable[[Path, random.Random], None]] = {
    "history, flipped bits": _rewritten("history.jsonl", _flipped),
    "history, an odd line": _rewritten("history.jsonl", lambda data, rng: data + rng.choice(LINES) + b"\n"),
    "history, no file": _not_a_file("history.jsonl"),
    "history, vast": _vast("history.jsonl"),
    "training rows, flipped bits": _rewritten("training_rows.safetensors", _flipped),
    "training rows, cut short": _rewritten("training_rows.safetensors", lambda data, rng: data[: rng.randrange(len(data))]),
    "training rows, no file": _not_a_file("training_rows.safetensors"),
    "training rows, vast": _vast("training_rows.safetensors"),
}
