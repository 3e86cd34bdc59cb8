"""What MkDocs does beyond its configuration: pages from outside docs/, links to them, and the command line's reference.

Files such as CHANGELOG.md are read where they are, and links that work in a checkout (`../benchmarks/RESULTS.md`) lead to their
pages on the site. The reference is made from the program itself, so it has every option that this version has, and no other.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PLUGINS = ("app", "index", "ray", "starter", "timm", "transformers", "clap")
#: Pages that are read from elsewhere in the repository.
INCLUDED = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "results.md": "benchmarks/RESULTS.md",
    **{f"plugins/{name}.md": f"plugins/bridgekit-{name}/README.md" for name in PLUGINS},
}
#: Where a link to a file that is no page leads.
STANDS_FOR = {
    ".": "index.md",
    "README.md": "index.md",
    "bridgekit/hookspecs.py": "reference/plugins.md",
    **{path: page for page, path in INCLUDED.items()},
    **{posixpath.dirname(path): page for page, path in INCLUDED.items() if page.startswith("plugins/")},
}
COMMANDS = "<!-- the commands -->"
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[([^\]\n]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are read from elsewhere."""
    for page, path in INCLUDED.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links out of docs/ lead to pages, and put the commands where they belong."""
    uri = page.file.src_uri
    folder = posixpath.dirname(INCLUDED.get(uri, f"docs/{uri}"))

    def relinked(link: re.Match[str]) -> str:
        title, target, anchor = link[1], link[2], link[3] or ""
        path = posixpath.normpath(posixpath.join(folder, target))
        if ":" in target or (path.startswith("docs/") and uri not in INCLUDED):
            return link[0]
        if not (ROOT / path).exists():
            raise PluginError(f"{folder}: the link to {target} leads nowhere")
        to = path.removeprefix("docs/") if path.startswith("docs/") else STANDS_FOR.get(path)
        return f"[{title}]({posixpath.relpath(to, posixpath.dirname(uri) or '.')}{anchor})" if to else title

    parts = [part if part.startswith("```") else _LINK.sub(relinked, part) for part in _FENCE.split(markdown)]
    text = "".join(parts)
    return text.replace(COMMANDS, "\n".join(_reference())) if COMMANDS in text else text


# ---- the command line's reference


def _reference() -> Iterator[str]:
    """Markdown for every verb: what it does, how it is called, its arguments and options."""
    import typer.main

    from bridgekit.cli import program as command_line

    program = typer.main.get_command(command_line())
    yield from _table("Before the verb", [parameter for parameter in program.params if _is_own(parameter)])
    yield from _verbs("bridgekit", program)


def _verbs(prefix: str, group: Any) -> Iterator[str]:
    for name, verb in group.commands.items():
        whole = f"{prefix} {name}"
        parameters = [parameter for parameter in verb.params if _is_own(parameter)]
        arguments = [parameter for parameter in parameters if parameter.param_type_name == "argument"]
        usage = [whole, "[OPTIONS]", *map(_usage, arguments)]
        yield from ("", f"## {whole}", "", _marked_up(verb.help or ""), "", "```text", " ".join(usage), "```", "")
        yield from _table("Argument", arguments)
        yield from _table("Option", [parameter for parameter in parameters if parameter not in arguments])
        if hasattr(verb, "commands"):
            yield from _verbs(whole, verb)


def _is_own(parameter: Any) -> bool:
    return not parameter.hidden and parameter.name not in ("help", "install_completion", "show_completion")


def _usage(argument: Any) -> str:
    shown = argument.name.upper() + ("..." if argument.nargs == -1 else "")
    return shown if argument.required else f"[{shown}]"


def _table(title: str, parameters: list[Any]) -> Iterator[str]:
    if parameters:
        yield from ("", f"| {title} | |", "|---|---|", *(f"| {_names(each)} | {_meaning(each)} |" for each in parameters), "")


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{_usage(parameter)}`"
    names = [*parameter.opts, *parameter.secondary_opts]
    value = "" if parameter.is_flag else f" {parameter.name.strip('_').upper()}"
    return ", ".join(f"`{name}{value if name.startswith('--') else ''}`" for name in names)


def _meaning(parameter: Any) -> str:
    told = _marked_up(parameter.help or "").replace("|", r"\|")
    if parameter.required and parameter.param_type_name == "option":
        told += " *required*"
    if "default:" in told or parameter.default is None or isinstance(parameter.default, bool) or callable(parameter.default):
        return told
    return f"{told} *default: {parameter.default}*"


def _marked_up(text: str) -> str:
    """Typer's markup as Markdown."""
    text = re.sub(r"\[b\](.*?)\[/b\]", r"`\1`", text)
    return re.sub(r"\[dim\](.*?)\[/dim\]", r"*\1*", text)
