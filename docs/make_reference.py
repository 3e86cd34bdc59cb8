"""Write the generated parts of docs/reference/*.md: `make reference`.

The text between `<!-- ::: NAME -->` and `<!-- ::: end -->` is generated: the signature and docstring of a Python name, or,
for the name `command line`, every command with its arguments and options. The pages are committed, so that they can also be
read on a code host; tests/test_docs.py fails where one is out of date.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

PAGES = Path(__file__).parent / "reference"
COMMAND_LINE = "command line"
_GENERATED = re.compile(r"(<!-- ::: ([\w. ]+?) -->\n).*?(<!-- ::: end -->)", re.DOTALL)
_SECTION = re.compile(r"(Arguments|Attributes|Returns|Raises):")


def rewritten(page: str) -> str:
    """A page with its generated parts made again."""

    def generated(part: re.Match[str]) -> str:
        lines = _command_line() if part[2] == COMMAND_LINE else _python(part[2])
        return part[1] + re.sub(r"\n{3,}", "\n\n", "\n".join(["", *lines, "", part[3]]))

    return _GENERATED.sub(generated, page)


# ---- Python


def _python(name: str) -> Iterator[str]:
    module, _, attribute = name.rpartition(".")
    named = getattr(import_module(module), attribute)
    if isinstance(named, Mapping):
        yield from _presets(attribute, named)
        return
    yield from _described(f"### {attribute}", module, attribute, named)
    if inspect.isclass(named) and not issubclass(named, Exception):
        for member, value in vars(named).items():
            if not member.startswith("_") and (isinstance(value, property | classmethod) or inspect.isfunction(value)):
                yield from _described(f"#### {attribute}.{member}", "", f"{attribute}.{member}", getattr(named, member, value))


def _described(heading: str, module: str, name: str, named: Any) -> Iterator[str]:
    options = _options_of(named)
    text, sections = _parsed(inspect.getdoc(named) or "")
    if options:
        text = re.sub(r"`[^`]+\(.*?\)`: takes the fields of `\w+`\.\s?| Takes the fields of `\w+`\.", "", text)
        sections = {"Arguments": _arguments_of(options), **sections}
    yield from (heading, "")
    if not (inspect.isclass(named) and (issubclass(named, Exception) or getattr(named, "_is_protocol", False))):
        yield from ("```python", *_signature(f"{module}.{name}".lstrip("."), named), "```", "")
    yield text.strip()
    for title, entries in sections.items():
        yield from ("", f"**{title}**", "", *(f"- {_entry(*entry)}" for entry in entries.items()))
    yield ""


def _entry(names: str, meaning: str) -> str:
    return f"{', '.join(f'`{name}`' for name in names.split(', '))}: {meaning}" if names else meaning


def _options_of(named: Any) -> type | None:
    """The options class of a function with the decorator `takes`, whose fields are its arguments."""
    run = getattr(named, "__wrapped__", None)
    options = run.__globals__.get(run.__annotations__.get("options")) if run else None
    return options if is_dataclass(options) and isinstance(options, type) else None


def _arguments_of(options: type) -> dict[str, str]:
    """What the docstrings of an options class and of its bases say of each field."""
    meanings: dict[str, tuple[str, str]] = {}
    for base in reversed(options.__mro__):
        for names, meaning in _parsed(inspect.cleandoc(vars(base).get("__doc__") or ""))[1].get("Arguments", {}).items():
            if not meaning.startswith("see `"):
                meanings |= dict.fromkeys(names.split(", "), (names, meaning))
    return dict(meanings[name] for name in sorted(meanings, key=_own_first(options)))


def _own_first(options: type) -> Callable[[str], int]:
    """Sorts the fields of an options class before those that it has from its bases."""
    names = [name for base in options.__mro__ for name in vars(base).get("__annotations__", {})]
    return lambda name: names.index(name)


def _parsed(docstring: str) -> tuple[str, dict[str, dict[str, str]]]:
    """A docstring's text, and its sections: names to meaning. What is returned has no name."""
    text: list[str] = []
    sections: dict[str, dict[str, str]] = {}
    title, names = "", ""
    for line in docstring.splitlines():
        heading = _SECTION.fullmatch(line)
        if heading:
            title, names = heading[1], ""
            sections[title] = {}
        elif line and not line.startswith("    "):
            title = ""
            text.append(line)
        elif not title:
            text.append(line)
        elif line.strip():
            starts = re.match(r"    ([\w*]+(?:, [\w*]+)*): (.*)", line) if title != "Returns" else None
            names = starts[1] if starts else names
            meaning = starts[2] if starts else f"{sections[title].get(names, '')} {line.strip()}".strip()
            sections[title][names] = meaning
    return "\n".join(text), sections


def _signature(name: str, named: Any) -> list[str]:
    if isinstance(named, property) and named.fget:
        return [f"{name}{_returns(named.fget)}"]
    signature = inspect.signature(named)
    shown: list[str] = []
    options = _options_of(named)
    parameters = list(signature.parameters.values())
    for parameter in sorted(parameters, key=lambda each: _own_first(options)(each.name)) if options else parameters:
        if parameter.name == "self" or parameter.name.startswith("_"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not any(each.startswith("*") for each in shown):
            shown.append("*")
        stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(parameter.kind.name, "")
        annotation = "" if parameter.annotation is parameter.empty else f": {_type(parameter.annotation)}"
        default = "" if parameter.default is parameter.empty else f" = {_value(parameter.default)}"
        shown.append(stars + parameter.name + annotation + default)
    returns = "" if inspect.isclass(named) else _returns(getattr(named, "__wrapped__", named))
    line = f"{name}({', '.join(shown)}){returns}"
    return [line] if len(line) <= 100 else [f"{name}(", *(f"    {each}," for each in shown), f"){returns}"]


def _returns(function: Callable[..., Any]) -> str:
    returned = inspect.signature(function).return_annotation
    return "" if returned is inspect.Signature.empty else f" -> {_type(returned)}"


def _type(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def _value(default: Any) -> str:
    shown = default.__name__ if inspect.isfunction(default) else repr(default)
    return "..." if shown.startswith("<") or len(shown) > 40 else shown


def _presets(name: str, presets: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"### {name}", "", "The presets by name:", "")
    yield from (f"| field | {' | '.join(f'`{each}`' for each in presets)} |", "|---" * (len(presets) + 1) + "|")
    for field in fields(next(iter(presets.values()))):
        values = [str(getattr(preset, field.name)) for preset in presets.values()]
        yield f"| `{field.name}` | {' | '.join(values)} |"


# ---- the command line


def _command_line() -> Iterator[str]:
    """Every command: what it does, how it is called, its arguments and options."""
    import typer.main

    from bridgekit.cli import program

    commands = typer.main.get_command(program())
    yield from _table("Before the command", [parameter for parameter in commands.params if _is_own(parameter)])
    yield from _commands("bridgekit", commands)


def _commands(prefix: str, group: Any) -> Iterator[str]:
    for name, command in sorted(group.commands.items()):
        whole = f"{prefix} {name}"
        parameters = [parameter for parameter in command.params if _is_own(parameter)]
        arguments = [parameter for parameter in parameters if parameter.param_type_name == "argument"]
        usage = [whole, "[OPTIONS]", *map(_usage, arguments)]
        yield from (f"## {whole}", "", _marked_up(command.help or ""), "", "```text", " ".join(usage), "```", "")
        yield from _table("Argument", arguments)
        yield from _table("Option", [parameter for parameter in parameters if parameter not in arguments])
        yield from _commands(whole, command) if hasattr(command, "commands") else ()


def _is_own(parameter: Any) -> bool:
    return not parameter.hidden and parameter.name not in ("help", "install_completion", "show_completion")


def _usage(argument: Any) -> str:
    shown = argument.name.upper() + ("..." if argument.nargs == -1 else "")
    return shown if argument.required else f"[{shown}]"


def _table(title: str, parameters: list[Any]) -> Iterator[str]:
    if parameters:
        yield from (f"| {title} | |", "|---|---|", *(f"| {_names(each)} | {_meaning(each)} |" for each in parameters), "")


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{_usage(parameter)}`"
    names = [*parameter.opts, *parameter.secondary_opts]
    value = "" if parameter.is_flag else f" {parameter.name.strip('_').upper()}"
    return ", ".join(f"`{name}{value if name.startswith('--') else ''}`" for name in names)


def _meaning(parameter: Any) -> str:
    meaning = _marked_up(parameter.help or "").replace("|", r"\|")
    if parameter.required and parameter.param_type_name == "option":
        meaning += " *required*"
    default = parameter.default
    if "default:" in meaning or default is None or isinstance(default, bool) or callable(default):
        return meaning
    return f"{meaning} *default: {default}*"


def _marked_up(text: str) -> str:
    """Typer's markup as Markdown."""
    text = re.sub(r"\[b\](.*?)\[/b\]", r"`\1`", text)
    return re.sub(r"\[dim\](.*?)\[/dim\]", r"*\1*", text)


if __name__ == "__main__":
    for page in sorted(PAGES.glob("*.md")):
        page.write_text(rewritten(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"{page}: {len(page.read_text(encoding='utf-8').splitlines())} lines", file=sys.stderr)
