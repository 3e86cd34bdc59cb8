"""`bridgekit subset`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from bridgekit.cli.common import OUTSIDE, print_json, print_set_aside, say


def command(
    pairs: Annotated[
        str,
        typer.Option(help="CSV, TSV, JSON Lines, Parquet, a folder of class folders, or a source's name (bridgekit plugins)."),
    ],
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="How many rows to train on.")],
    on: Annotated[str, typer.Option(help="Whose latents decide: a modality, or an encoder as [b]provider:model[/b].")] = "text",
    method: Annotated[str, typer.Option(help="k-dpp (diverse rows) or uniform (a draw).")] = "k-dpp",
    seed: Annotated[
        int, typer.Option(min=0, help="Of the draw; with k-dpp, of which row comes first, and of which of those with one item.")
    ] = 0,
    out: Annotated[Path, typer.Option(help="Where to write: .csv, .tsv, .jsonl or .parquet.")] = Path("chosen.csv"),
    device: Annotated[str, typer.Option(help="A torch device, or auto.")] = "auto",
    outside: Annotated[bool, typer.Option("--outside", help=OUTSIDE)] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail where a row would be set aside.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Choose which pairs to train on: k diverse ones, or a uniform draw. Rows of other splits than train stay.

    Example: [b]bridgekit subset --pairs clips.csv --k 5000 --out chosen.csv[/b]
    """
    from bridgekit.recipes.subset import choose_pairs

    done = choose_pairs(pairs, k, on=on, method=method, seed=seed, out=out, device=device, strict=strict, outside=outside)
    if as_json:
        print_json(
            {
                "table": str(out),
                "method": method,
                "encoder": done.encoder,
                "modality": done.modality,
                "seed": seed,
                "candidates": done.candidates,
                "distinct": done.distinct,
                "chosen": done.chosen,
                "kept": dict(done.kept),
                "set_aside": [vars(row) for row in done.pairs.set_aside],
            }
        )
        return
    print_set_aside(done.pairs.set_aside)
    say(f"{done.chosen:,} of {done.candidates:,} rows were chosen by {method} on {done.modality} ({done.encoder}).")
    if done.chosen < k:
        print("There are no more.")
    elif method == "k-dpp" and done.chosen > done.distinct:
        say(f"They have only {done.distinct:,} different items of {done.modality}: some repeat.")
    if done.pairs.split is None:
        print("The table has no column `split`: the rows to test on will be some of these.")
    elif done.kept:
        say(f"Kept as they were: {', '.join(f'{count:,} {split}' for split, count in done.kept.items())}.")
    say(f"Table:  {out}")
    say(f"Next:   bridgekit align --pairs {shlex.quote(str(out))}{' --outside' if done.leads_outside(out) else ''}")
