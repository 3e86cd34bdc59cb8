"""Writes a new plugin: the one in `plugins/bridgekit-template`, which comes with this package, under another name."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from bridgekit.errors import BridgekitError
from bridgekit.plugins import OURS, VERBS
from bridgekit.storage.cache import one_writer, write_folder_atomically

#: What is copied, relative to the template. Named one by one, since building leaves other files beside them.
FILES = ("README.md", "pyproject.toml", "bridgekit_template.py", "tests/test_template.py")


def create_plugin(name: str, parent: Path) -> tuple[Path, ...]:
    """Write a working plugin into a new folder.

    Arguments:
        name: `bridgekit-demo`, or `demo` for short: folder and package are `bridgekit-demo`, the module is `bridgekit_demo`,
            and its encoders are named `demo:model`.
        parent: where to make the folder.

    Returns:
        the files, the folder's name first in each: `parent / "bridgekit-demo" / ...`.

    Raises:
        BridgekitError: the name cannot be one, is that of a plugin of ours, or there is something of that name already.
    """
    short = name.removeprefix("bridgekit-")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", short) or short == "bridgekit":
        raise BridgekitError(
            f"{name!r} cannot be the name of a plugin",
            remedy="use small letters, digits and single dashes, as in bridgekit-demo",
        )
    if short in (*OURS, *VERBS):
        raise BridgekitError(f"bridgekit-{short} is a plugin of bridgekit's own", remedy="choose another name")
    folder = parent / f"bridgekit-{short}"
    underlined = short.replace("-", "_")

    def renamed(text: str) -> str:
        return re.sub(r"(bridgekit_)?template", lambda found: f"bridgekit_{underlined}" if found[1] else short, text)

    template = files("bridgekit") / "template"
    contents = {
        file.replace("template", underlined): renamed(template.joinpath(file).read_text(encoding="utf-8")) for file in FILES
    }

    def fill(aside: Path) -> None:
        for file, content in contents.items():
            (aside / file).parent.mkdir(exist_ok=True)
            (aside / file).write_text(content, encoding="utf-8")

    if not parent.is_dir():
        raise BridgekitError(
            "the plugin cannot be written: there is no such folder", where=str(parent), remedy="go to a folder of your own"
        )
    with one_writer(folder):
        if folder.exists():
            raise BridgekitError("there is something of this name already", where=str(folder), remedy="choose another name")
        write_folder_atomically(folder, fill)
    return tuple(folder / file for file in contents)
