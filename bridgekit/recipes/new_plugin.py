"""`plugins new`: create a plugin from the template in `plugins/bridgekit-template`, which ships with this package."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from bridgekit.errors import BridgekitError
from bridgekit.plugins import OURS, VERBS
from bridgekit.storage.cache import one_writer, write_folder_atomically

#: Modalities that have a template of their own. The others share one.
MODALITIES = ("audio", "image", "text")
#: Files of a plugin, as in the template. Listed, since builds leave other files next to them.
FILES = ("README.md", "pyproject.toml", "bridgekit_template.py", "tests/test_template.py")


def sources(modality: str | None) -> dict[str, str]:
    """`FILES`, each with the file in the template that it is copied from."""
    if modality is None:
        return {file: file for file in FILES}
    own = ("modalities/README.md", FILES[1], f"modalities/{modality}.py", f"modalities/tests/{modality}.py")
    return dict(zip(FILES, own, strict=True))


def create_plugin(name: str, parent: Path, modality: str | None = None) -> tuple[Path, ...]:
    """Write a working plugin into a new folder.

    Arguments:
        name: `bridgekit-demo`, or `demo` for short: the folder and package are named `bridgekit-demo`, the module
            `bridgekit_demo`, and its encoders `demo:model`.
        parent: where to create the folder.
        modality: one of `MODALITIES`, for an encoder of it. Without it, the plugin adds a modality of its own, `motion`.

    Returns:
        the paths of the files, `parent / "bridgekit-demo" / ...`.

    Raises:
        BridgekitError: the name is invalid, belongs to one of our own plugins, or exists already; or there is no template for
            the modality.
    """
    short = name.removeprefix("bridgekit-")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", short) or short == "bridgekit":
        raise BridgekitError(
            f"{name!r} is not a valid plugin name",
            remedy="use lower-case letters, digits and single dashes, as in bridgekit-demo",
        )
    if short in (*OURS, *VERBS):
        raise BridgekitError(f"bridgekit-{short} is one of bridgekit's own plugins", remedy="choose another name")
    if modality not in (None, *MODALITIES):
        raise BridgekitError(
            f"there is no template for the modality {modality!r}",
            remedy=f"choose {', '.join(MODALITIES)}; or leave it out, for a plugin with a modality of its own",
        )
    folder = parent / f"bridgekit-{short}"
    underlined = short.replace("-", "_")

    def renamed(text: str) -> str:
        text = text.replace("MODALITY", str(modality))
        return re.sub(r"(bridgekit_)?template", lambda found: f"bridgekit_{underlined}" if found[1] else short, text)

    template = files("bridgekit") / "template"
    contents = {
        file.replace("template", underlined): renamed(template.joinpath(source).read_text(encoding="utf-8"))
        for file, source in sources(modality).items()
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
