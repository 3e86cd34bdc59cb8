"""Fetches the sounds that `sounds.csv` names out of Debian's packages: python fetch_sounds.py --work /tmp/sounds

Needs apt-get (with lists: `apt-get update`) and dpkg-deb, and 3 GB of disk. Each package is downloaded once, in the version of
`sound_packages.csv` where the archive still has it; only the members that `sounds.csv` names are unpacked, archives within
archives included. A sound with `loop` is one turn of an engine, which its game repeats: it is repeated here too. The clips land
in WORK/clips/PACKAGE/, and WORK/pairs.csv gets a row per caption: audio, text, kind, package. Run again, it goes on where it
was stopped. `--package NAME` (repeatable) fetches those alone.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import math
import re
import subprocess
import sys
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
from sound_archives import members

HERE = Path(__file__).parent
Row = dict[str, str]


def read_table(path: Path) -> list[Row]:
    """Return the rows of a CSV file as dictionaries."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def download(source: Row, folder: Path) -> Path:
    """Return the package's .deb in `folder`, fetched with apt-get unless it is there."""
    package, version = source["package"], source["version"]
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(folder.glob(f"{package}_*.deb"))
    for name in (f"{package}={version}", package):
        if not found:
            done = subprocess.run(["apt-get", "download", "-qq", name], cwd=folder, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{name}: {done.stderr.strip()}", file=sys.stderr)
            found = sorted(folder.glob(f"{package}_*.deb"))
    if not found:
        raise SystemExit(f"{package}: cannot be downloaded. Run `apt-get update` on Debian 13 or newer, then this again.")
    if hashlib.sha256(found[-1].read_bytes()).hexdigest() != source["sha256"]:
        print(f"{package}: {found[-1].name} is not the file that the labels were made from", file=sys.stderr)
    return found[-1]


def unpack(deb: Path, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
    """Yield (path, bytes) of the wanted members; `archive!member` names what is inside an archive of the package."""
    outer = {path.split("!")[0] for path in wanted}
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as archive,
    ):
        for entry in archive:
            path = entry.name.removeprefix("./")
            if path not in outer or not entry.isfile():
                continue
            file = archive.extractfile(entry)
            assert file is not None  # a regular file has content
            data = file.read()
            if path in wanted:
                yield path, data
            for name, content in members(path, data):
                if f"{path}!{name}" in wanted:
                    yield f"{path}!{name}", content


def clip_name(path: str, data: bytes) -> str:
    """Return a file name for a member, with the suffix of the format that libsndfile finds in it."""
    kind = soundfile.info(io.BytesIO(data)).format.lower()
    stem = re.sub(r"\.(wav|ogg|oga|flac|mp3|aiff?)$", "", path.removeprefix("usr/share/"), flags=re.IGNORECASE)
    return re.sub(r"[^\w.-]+", "_", stem) + {"wavex": ".wav", "mpeg": ".mp3"}.get(kind, f".{kind}")


def repeated(data: bytes, seconds: float = 3.0) -> bytes:
    """Return a short sound repeated to at least `seconds`, as WAV."""
    wave, rate = soundfile.read(io.BytesIO(data), always_2d=True)
    times = math.ceil(seconds * rate / len(wave))
    buffer = io.BytesIO()
    soundfile.write(buffer, np.tile(wave, (times, 1)), rate, format="WAV")
    return buffer.getvalue()


def fetch(source: Row, rows: list[Row], work: Path) -> dict[str, Path]:
    """Unpack one package's sounds and return where each path's clip lies."""
    folder = work / "clips" / source["package"]
    listing = folder / "members.csv"
    wanted = {row["path"] for row in rows}
    loops = {row["path"] for row in rows if row["loop"]}
    clips = {row["path"]: row["clip"] for row in read_table(listing)} if listing.exists() else {}
    if wanted - clips.keys():
        folder.mkdir(parents=True, exist_ok=True)
        for path, data in unpack(download(source, work / "packages"), wanted):
            data = repeated(data) if path in loops else data
            clips[path] = clip_name(path, data)
            (folder / clips[path]).write_bytes(data)
        with listing.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("path", "clip"), *clips.items()])
    return {path: folder / clip for path, clip in clips.items() if path in wanted}


def main() -> None:
    """Fetch every package and write the table of pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for packages, clips and pairs.csv")
    parser.add_argument("--package", action="append", help="fetch this package alone (repeatable)")
    options = parser.parse_args()
    by_package = defaultdict(list)
    for row in read_table(HERE / "sounds.csv"):
        by_package[row["package"]].append(row)
    work = options.work.resolve()
    pairs = []
    for source in read_table(HERE / "sound_packages.csv"):
        package = source["package"]
        if options.package and package not in options.package:
            continue
        clips = fetch(source, by_package[package], work)
        missing = [row["path"] for row in by_package[package] if row["path"] not in clips]
        print(f"{package}: {len(clips)} sounds" + (f", {len(missing)} not in it: {missing[0]} ..." if missing else ""))
        for row in by_package[package]:
            if row["path"] in clips:
                audio = clips[row["path"]].relative_to(work)
                pairs += [(audio, text, row["kind"], package) for text in row["captions"].split("|")]
    with (work / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("audio", "text", "kind", "package"), *pairs])
    print(f"{len({pair[0] for pair in pairs})} sounds, {len(pairs)} pairs: {work / 'pairs.csv'}")


if __name__ == "__main__":
    main()
