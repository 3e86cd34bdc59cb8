"""The command line: one file a verb. This file gathers them and turns errors into messages."""

from __future__ import annotations

import functools
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Annotated

import typer

from bridgekit import plugins as installed
from bridgekit.cli import (
    align,
    bind,
    check,
    embed,
    encode,
    evaluate,
    generate,
    index,
    info,
    plugins,
    report,
    search,
    subset,
)
from bridgekit.cli import app as app_
from bridgekit.errors import BridgekitError
from bridgekit.plain import plain_json

app = typer.Typer(
    name="bridgekit",
    help="One shared space for two or more modalities, from frozen encoders and a few thousand pairs, on one machine.",
    epilog="Start with: bridgekit align --a audio --b text",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"bridgekit {version('bridgekit')}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with errors.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Options before the verb."""


class _Terminated(KeyboardInterrupt):
    """SIGTERM came, from `kill`, a time limit or the system's shutdown: what is under way ends as by Ctrl-C."""


def _terminate(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
    raise _Terminated


def _says_when_stopped(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb, with a word for whoever stops it. Inside the verb, since typer would swallow the interrupt."""

    @functools.wraps(verb)
    def run(*arguments: object, **options: object) -> None:
        main = threading.current_thread() is threading.main_thread()  # no other thread may say what signals do
        before = signal.signal(signal.SIGTERM, _terminate) if main else None
        try:
            _import_torch()
            verb(*arguments, **options)
        except KeyboardInterrupt as stop:
            print("\nbridgekit: stopped. Nothing is lost: the same command goes on from here.", file=sys.stderr)
            sys.exit(128 + (signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT))
        finally:
            if before is not None:
                signal.signal(signal.SIGTERM, before)

    return run


def _import_torch() -> None:
    """Import PyTorch, which takes seconds and which every verb needs, with a spinner on a terminal meanwhile."""
    if sys.stderr.isatty() and "torch" not in sys.modules:
        from rich.console import Console

        with Console(stderr=True).status("loading PyTorch"):
            import torch  # noqa: F401


VERBS: dict[str, Callable[..., None]] = {
    "check": check.command,
    "align": align.command,
    "bind": bind.command,
    "eval": evaluate.command,
    "encode": encode.command,
    "embed": embed.command,
    "index": index.command,
    "search": search.command,
    "generate": generate.command,
    "subset": subset.command,
    "info": info.command,
    "report": report.command,
    "app": app_.command,
}
for name, verb in VERBS.items():
    app.command(name, help=verb.__doc__, no_args_is_help=False)(_says_when_stopped(verb))
app.add_typer(plugins.app, name="plugins")


def main() -> None:
    """Run the command line. Errors that the user can mend exit with 2 and no traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character shows its number
    # OpenMP's threads spin while they wait, if not told otherwise before it is loaded. Where another program has a core, that
    # doubles the CPU time of an encoder at least.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    installed.register_commands(app)
    try:
        app()
    except BridgekitError as error:
        if "--debug" in sys.argv:
            raise
        if "--json" in sys.argv:
            told = {"error": {"what": error.what, "where": error.where, "fix": error.remedy}}
            print(plain_json(json.dumps(told, ensure_ascii=False)))
        print(f"bridgekit: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
