"""`bridgekit align`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from bridgekit.cli.common import print_json, print_metrics, print_set_aside


def command(
    a: Annotated[str, typer.Option("--a", help="One side: a modality, or an encoder as [b]provider:model[/b].")] = "audio",
    b: Annotated[str, typer.Option("--b", help="The other side.")] = "text",
    pairs: Annotated[
        str | None,
        typer.Option(help="CSV, TSV, JSON Lines, Parquet, a folder of class folders, or a source's name (bridgekit plugins)."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The bridge's folder. [dim]default: bridges/A-B[/dim]")] = None,
    preset: Annotated[
        str, typer.Option(help="Hyperparameters: default (a few thousand pairs) or paper (FuseMix's own).")
    ] = "default",
    freeze: Annotated[str | None, typer.Option(help="A modality whose own latents are to be the space.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    device: Annotated[str, typer.Option(help="A torch device, or auto.")] = "auto",
    strict: Annotated[bool, typer.Option("--strict", help="Fail where a row would be set aside.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on from an interrupted run of the same command.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another bridge at --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Two piles of files become one space: encode once, fuse, evaluate, save a bridge.

    Example: [b]bridgekit align --a audio --b text --pairs clips.csv[/b]
    """
    from bridgekit.alignment import run_alignment

    done = run_alignment(
        a,
        b,
        pairs,
        out=out,
        preset=preset,
        frozen=freeze,
        seed=seed,
        device=device,
        strict=strict,
        resume=resume,
        overwrite=overwrite,
    )
    bridge = done.bridge
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
    counts = ", ".join(f"{count:,} {split}" for split, count in bridge.provenance["rows"].items())
    print(f"Rows: {counts}.")
    print_metrics(bridge.metrics, "Recall on rows that training never saw, in %")
    what = "This bridge was made by the same command before; nothing had to be done again" if done.reused else "Bridge"
    print(f"{what}: {done.folder}")
    print(f"Next:   {_next_command(str(done.example), done.folder)}")


def _next_command(example: str, folder: Path) -> str:
    return f"bridgekit search {shlex.quote(example)} --bridge {shlex.quote(str(folder))}"
