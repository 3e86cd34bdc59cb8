"""The command line: a file for each verb. This one gathers them and turns errors into messages."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from bridgekit import plugins as installed
from bridgekit.cli import align, bind, check, compare, embed, encode, evaluate, generate, info, plugins, report, search
from bridgekit.cli.common import interruptible
from bridgekit.errors import BridgekitError
from bridgekit.plain import plain_json

VERBS: dict[str, Callable[..., None]] = {
    "check": check.command,
    "compare": compare.command,
    "align": align.command,
    "bind": bind.command,
    "eval": evaluate.command,
    "encode": encode.command,
    "embed": embed.command,
    "search": search.command,
    "generate": generate.command,
    "info": info.command,
    "report": report.command,
}


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"bridgekit {version('bridgekit-core')}")
        raise typer.Exit


def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with errors.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Options before the verb."""


def program() -> typer.Typer:
    """The whole command line: the verbs of the core, those of the installed plugins, and where to get our plugins' verbs."""
    app = typer.Typer(
        name="bridgekit",
        help="One shared space for two or more modalities, from frozen encoders and a few thousand pairs, on one machine.",
        epilog="On your own data, a table with a column per modality:\n\n[b]bridgekit align --pairs clips.csv[/b]",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        rich_markup_mode="rich",
        callback=options,
    )
    for name, verb in VERBS.items():
        app.command(name, help=verb.__doc__, no_args_is_help=False)(interruptible(verb))
    app.add_typer(plugins.app, name="plugins")
    installed.register_commands(app)
    there = {command.name for command in app.registered_commands}
    for name in installed.VERBS:
        if name not in there:
            _add_missing(app, name)
    return app


def _add_missing(app: typer.Typer, name: str) -> None:
    """Add a verb of our own plugin that is not installed: whatever its arguments, it says what to install."""

    def command() -> None:
        raise installed.not_installed(name)

    text = f"{installed.VERBS[name]}\n\nNot installed; {installed.INSTALL.format(name)}"
    anything = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(name, help=text, short_help=f"Not installed: bridgekit {name} --help", context_settings=anything)(command)


def main() -> None:
    """Run the command line. Errors that the user can fix exit with 2, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character shows its number
    # OpenMP's threads spin while they wait, unless this is set before torch loads it. Beside another program on the same cores
    # that at least doubles the CPU time of encoding.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        program()()
    except BridgekitError as error:
        if "--debug" in sys.argv:
            raise
        if "--json" in sys.argv:
            print(plain_json(json.dumps(error.as_json(), ensure_ascii=False)))
        print(f"bridgekit: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
