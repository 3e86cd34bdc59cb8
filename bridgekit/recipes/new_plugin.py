"""`plugins new`: create a plugin from the template in `plugins/bridgekit-template`, which ships with this package."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from bridgekit.errors import BridgekitError
from bridgekit.plugins import OURS, VERBS
from bridgekit.storage.cache import one_writer, write_folder_atomically

#: Files to copy from the template. Listed, since builds leave other files next to them.
FILES = ("README.md", "pyproject.toml", "bridgekit_template.py", "tests/test_template.py")


def create_plugin(name: str, parent: Path) -> tuple[Path, ...]:
    """Write a working plugin into a new folder.

    Arguments:
        name: `bridgekit-demo`, or `demo` for short: the folder and package are named `bridgekit-demo`, the module
            `bridgekit_demo`, and its encoders `demo:model`.
        parent: where to create the folder.

    Returns:
        the paths of the files, `parent / "bridgekit-demo" / ...`.

    Raises:
        BridgekitError: the name is invalid, belongs to one of our own plugins, or exists already.
    """
    short = name.removeprefix("bridgekit-")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", short) or short == "bridgekit":
        raise BridgekitError(
            f"{name!r} is not a valid plugin name",
            remedy="use lower-case letters, digits and single dashes, as in bridgekit-demo",
        )
    if short in (*OURS, *VERBS):
        raise BridgekitError(f"bridgekit-{short} is one of bridgekit's own plugins", remedy="choose another name")
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
            "the plugin cannot be written: there is no such folder", where=str(parent), remedy="change to an existing folder"
        )
    with one_writer(folder):
        if folder.exists():
            raise BridgekitError("the path already exists", where=str(folder), remedy="choose another name")
        write_folder_atomically(folder, fill)
    return tuple(folder / file for file in contents)
