"""Helpers shared by the verbs: finding the bridge, choosing what to search, printing metrics, handling Ctrl-C."""

from __future__ import annotations

import functools
import os
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bridgekit import interrupts
from bridgekit.errors import BridgekitError
from bridgekit.storage.cache import put_all_back
from bridgekit.terminal import error_console, print_json, print_table, say, say_lines

if TYPE_CHECKING:
    from bridgekit.bridge.bridge import Bridge
    from bridgekit.pairs import SetAside
    from bridgekit.recipes.fit import Alignment

#: Default folder of bridges.
BRIDGES = Path("bridges")
#: Maximum size in bytes of a bridge.json.
LARGEST = 16 << 20
#: Help text of options that several verbs have.
PAIRS = "A table (CSV, JSON, Parquet, ...), a folder of files or tables, or a plugin's table, such as datasets:org/name."
SIDE = "A modality, or an encoder as [b]provider:model[/b]."
NEWEST = "The bridge's folder. [dim]default: the newest in ./bridges, or the one that comes with the starter[/dim]"

BridgeArgument = Annotated[Path | None, typer.Argument(help=NEWEST)]
BridgeOption = Annotated[Path | None, typer.Option(help=NEWEST)]
Device = Annotated[str, typer.Option(help="A torch device, or auto.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Half = Annotated[
    bool, typer.Option("--half", help="Keep latents in half precision during training: half the memory and disk reads.")
]
Outside = Annotated[bool, typer.Option("--outside", help="Let a table refer to files outside its own folder.")]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        metavar="MODALITY=NAME",
        help="The column of a modality, as in image=img, or several, as in text=caption_1,caption_2. Repeatable.",
    ),
]
Method = Annotated[
    str,
    typer.Option(
        help="ridge, closed-form, self-training or fusemix. [dim]default: auto, what validation prefers[/dim]",
        show_default=False,
    ),
]
Resume = Annotated[bool, typer.Option(help="Continue an interrupted run of the same command.")]
Seed = Annotated[int, typer.Option(help="Random seed.")]
Strict = Annotated[bool, typer.Option("--strict", help="Fail if a row would be set aside.")]

#: Explanations of the methods in a recall table. Older bridges have others.
METHODS = {
    "random": "adapters with random weights",
    "ridge": "ridge regression",
    "closed form": "regularised canonical correlation analysis",
    "self-training": "the closed form, also of unpaired items and their likely partners",
}
#: Rows set aside that are listed; `--json` has all.
SHOWN = 10


def interruptible(verb: Callable[..., None]) -> Callable[..., None]:
    """Wrap a verb so that Ctrl-C and SIGTERM end it with a message instead of a traceback."""

    # Around the verb rather than the program, since typer would swallow the interrupt.
    @functools.wraps(verb)
    def run(*arguments: object, **options: object) -> None:
        with interrupts.handled():
            try:
                _import_torch()
                verb(*arguments, **options)
            except (KeyboardInterrupt, Exception) as error:
                number = interrupts.received()
                if number is None and not isinstance(error, KeyboardInterrupt):
                    raise
                say_lines("\nbridgekit: stopped. Nothing is lost: run the same command again to continue.", sys.stderr)
                sys.exit(128 + (number or signal.SIGINT))

    return run


def _import_torch() -> None:
    """Import PyTorch, which every verb needs and which takes seconds, with a spinner if on a terminal."""
    if sys.stderr.isatty() and "torch" not in sys.modules:
        with error_console().status("loading PyTorch"):
            import torch  # noqa: F401


def parse_columns(given: Sequence[str] | None) -> dict[str, str]:
    """The values of --column, such as `image=img`, as {"image": "img"}.

    Raises:
        BridgekitError: one has no `=`, or a modality is named twice.
    """
    columns: dict[str, str] = {}
    for each in given or ():
        modality, _, name = each.partition("=")
        if not modality or not name:
            raise BridgekitError("--column takes MODALITY=NAME", where=each[:200], remedy="for example --column image=img")
        if modality in columns:
            both = f"{columns[modality]},{name}"
            raise BridgekitError(
                f"two columns are named for {modality}",
                where=each[:200],
                remedy=f"to use both, write --column {modality}={both}",
            )
        columns[modality] = name
    return columns


def find_bridge(path: Path | None, *, bundled: bool = True) -> Path:
    """The given bridge, or else the newest in ./bridges, or else, if `bundled`, one that comes with a plugin."""
    found = path or newest_bridge(bundled=bundled)
    if found is None:
        raise BridgekitError(
            "there is no bridge in ./bridges", remedy="train one (bridgekit align --a audio --b text) or give its folder"
        )
    return found


def newest_bridge(modalities: Set[str] = frozenset(), *, bundled: bool = True) -> Path | None:
    """The newest bridge in ./bridges with these modalities, or else, if `bundled`, a plugin's with them, or None."""
    from bridgekit.plugins import bundled_bridge
    from bridgekit.storage.bounded import read_json

    put_all_back(BRIDGES)
    # A name with a leading dot is a bridge being written, or left behind by a killed process.
    found = [file for file in BRIDGES.glob("[!.]*/bridge.json") if file.is_file()]
    own = sorted(found, key=lambda file: file.stat().st_mtime, reverse=True)
    brought = bundled_bridge() if bundled else None
    for file in (*own, *([brought / "bridge.json"] if brought else [])):
        with suppress(OSError, ValueError, KeyError, TypeError):  # a damaged bridge is reported only if given explicitly
            if modalities <= set(read_json(file, LARGEST)["sides"]):
                # Printed, since the newest may not be the intended one.
                if file.parent == brought:
                    why = "comes with bridgekit; bridgekit align trains your own"
                else:
                    why = "the newest; choose another by its folder or --bridge"
                say(f"Bridge: {file.parent.name if file.parent == brought else file.parent} ({why})", sys.stderr)
                return file.parent
    return None


def other_modality(modalities: Sequence[str], modality: str) -> str:
    """The default modality to search: the other one (or the only one), or text if there are several."""
    others = [name for name in modalities if name != modality] or modalities
    if len(others) == 1 or "text" in others:
        return others[0] if len(others) == 1 else "text"
    raise BridgekitError(
        f"several modalities to search: {', '.join(others)}", remedy=f"choose one, for example --to {others[0]}"
    )


def print_set_aside(rows: Sequence[SetAside]) -> None:
    """Print how many rows were set aside, and the first `SHOWN` of them, on standard error."""
    if not rows:
        return
    say(f"{len(rows)} {'row was' if len(rows) == 1 else 'rows were'} set aside:", sys.stderr)
    for row in sorted(rows, key=lambda row: row.row)[:SHOWN]:
        say(f"  row {row.row}, {row.column}: {f'{row.item}: ' if row.item else ''}{row.reason}", sys.stderr)
    if len(rows) > SHOWN:
        say(f"  ... and {len(rows) - SHOWN} more", sys.stderr)
    say("  fix: correct or remove these rows, or continue without them", sys.stderr)


def print_metrics(metrics: Sequence[Mapping[str, Any]], title: str, bridge: Bridge) -> None:
    """Print a recall table, one line per method for each split, direction and candidate set. That of the bridge is bold."""
    if not metrics:
        return
    from bridgekit.evaluation.recall import sides_of
    from bridgekit.retrieval import FEW, recall_cell

    columns = ("split", "query → answer", "among", "method", "@1", "@5", "@10", "median\nrank")
    rows: list[tuple[Sequence[object], bool]] = []
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for record in metrics:
        groups.setdefault((record["split"], record["direction"], f"{record['candidates']:,}"), []).append(record)
    for key, records in groups.items():
        for number, record in enumerate(records):
            label = key if number == 0 else ("", "", "")
            recalls = [recall_cell(record, k) for k in (1, 5, 10)]
            own = record["method"] == bridge.method(*sides_of(record)) and len(records) > 1
            rows.append(((*label, record["method"], *recalls, f"{record['median_rank']:g}"), own))
    print_table(title, columns, rows, text={"split", "query → answer", "method"})
    say("among: number of candidates, first the split's own, then the whole table's.")
    methods = {record["method"] for record in metrics}
    explained = [f"{method}: {what}" for method, what in METHODS.items() if method in methods]
    if explained:
        say(f"{'; '.join(explained)}.")
    cells = {recall_cell(record, k): record for record in metrics for k in (1, 5, 10)}
    interval = next((cell for cell in cells if "–" in cell[1:]), None)
    if interval:
        few = min(record["queries"] for record in metrics)
        say(f"{interval}: 95 % confidence interval, for fewer than {FEW} queries (fewest: {few}).")
    if "–" in cells:
        say("–: nothing to measure, with k candidates or fewer.")


def _print_choice(provenance: Mapping[str, Any]) -> None:
    """Print which method the bridge is from, and how sure its choice is."""
    choice = provenance.get("choice")
    if choice is None:
        return
    low, high = (f"{100 * bound + 0.0:+.1f}" for bound in choice["interval"])
    say(
        f"Saved: {choice['method']}. On the validation rows its recall less that of {choice['rival']} is "
        f"{100 * choice['difference'] + 0.0:+.1f} points (95 % interval {low} to {high}, {choice['queries']:,} queries)."
        + (" That is not sure enough to prefer FuseMix." if choice["difference"] < 0 else "")
    )


def print_alignment(done: Alignment, as_json: bool, *, bound: bool = False) -> None:
    """Print the summary of an `align` or `bind` run, and what to try next."""
    from bridgekit.evaluation.recall import sides_of

    if os.environ.get("RANK", "0") != "0":
        return  # under torchrun, only the first process prints
    bridge = done.bridge
    provenance = bridge.provenance["bound"][-1] if bound else bridge.provenance
    if "diverged" in provenance:
        say_lines(
            f"Training diverged in epoch {provenance['diverged']}: the loss or weights became infinite or NaN. "
            f"The bridge has the weights of epoch {provenance['best_epoch']}, the best before that.\n"
            "  fix: check for extreme latents (bridgekit check), or use a preset with a lower lr",
            sys.stderr,
        )
    if as_json:
        print_json(
            {
                "bridge": str(done.folder),
                "reused": done.reused,
                "provenance": dict(bridge.provenance),
                "metrics": list(bridge.metrics),
                "set_aside": [vars(row) for row in done.set_aside],
            }
        )
        return
    print_set_aside(done.set_aside)
    sides = provenance.get("modalities", list(bridge.sides))
    say(f"Sides: {', '.join(f'{modality} by {bridge.sides[modality].encoder}' for modality in sides)}.")
    say(f"Rows: {', '.join(f'{count:,} {split}' for split, count in provenance['rows'].items())}.")
    if "unpaired" in provenance:
        say(f"Unpaired: {', '.join(f'{count:,} {modality}' for modality, count in provenance['unpaired'].items())}.")
    pairs = [pair for pair in combinations(sides, 2) if not bound or provenance["modality"] in pair]
    measured = {sides_of(record) for record in bridge.metrics}
    records = [record for record in bridge.metrics if sides_of(record) in map(frozenset, pairs)]
    print_metrics(records, "Recall@k on held-out rows, in %", bridge)
    _print_choice(provenance)
    for a, b in pairs:
        if frozenset((a, b)) not in measured:
            say(f"No test row has both {a} and {b}, so recall between them was not measured.")
    what = "Reused the bridge of an earlier run of the same command" if done.reused else "Bridge"
    say(f"{what}: {done.folder}")
    if bound:
        say(f"Report: bridgekit report {shlex.quote(str(done.folder))} (rewrites it for all tables)")
    elif (done.folder / "report.html").exists():
        say(f"Report: {done.folder / 'report.html'} (open it in a browser)")
    say(f"Next:   bridgekit search {shlex.quote(str(done.example))} --bridge {shlex.quote(str(done.folder))}")
