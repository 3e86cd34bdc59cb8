"""The command line: a file for each verb. This one gathers them and turns errors into messages."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from bridgekit import plugins as installed
from bridgekit.cli import align, bind, check, compare, embed, encode, evaluate, generate, info, plugins, report, search
from bridgekit.cli.common import interruptible
from bridgekit.errors import BridgekitError
from bridgekit.plain import plain
from bridgekit.terminal import print_json, print_traceback, say, say_lines

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


class _Group(TyperGroup):
    """The verbs. Usage errors quote arguments, which may be file names (`bridgekit info *`): they are made safe to print."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _safe_errors():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with _safe_errors():
            return super().invoke(ctx)


@contextmanager
def _safe_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if hasattr(error, "format_message"):  # click's, of which typer may have a copy
            error.message = plain(error.message)  # type: ignore[attr-defined]
        raise


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        say(f"bridgekit {version('bridgekit-core')}")
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
        cls=_Group,
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
    sys.excepthook = print_traceback
    # OpenMP's threads spin while they wait, unless this is set before torch loads it. Beside another program on the same cores
    # that at least doubles the CPU time of encoding.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        program()()
    except BridgekitError as error:
        if "--debug" in sys.argv:
            raise
        if "--json" in sys.argv:
            print_json(error.as_json(), indent=None)
        say_lines(f"bridgekit: {error}", sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
