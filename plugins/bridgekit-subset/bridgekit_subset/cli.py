"""`bridgekit subset`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from bridgekit.cli.common import PAIRS, Columns, Device, Json, Outside, Strict, parse_columns, print_set_aside
from bridgekit.terminal import print_json, say


def command(
    pairs: Annotated[
        str,
        typer.Option(help=PAIRS),
    ],
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Number of training rows to choose.")],
    on: Annotated[str, typer.Option(help="Latents to choose by: a modality, or an encoder as [b]provider:model[/b].")] = "text",
    method: Annotated[str, typer.Option(help="k-dpp (diverse) or uniform (random sample).")] = "k-dpp",
    seed: Annotated[int, typer.Option(min=0, help="Random seed; with k-dpp, of the first row and of ties.")] = 0,
    out: Annotated[Path, typer.Option(help="Output table: .csv, .tsv, .jsonl or .parquet.")] = Path("chosen.csv"),
    device: Device = "auto",
    outside: Outside = False,
    column: Columns = None,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Choose k training pairs, diverse or at random. Rows of other splits are kept.

    Example: [b]bridgekit subset --pairs clips.csv --k 5000 --out chosen.csv[/b]
    """
    from bridgekit_subset.pairs import choose_pairs

    done = choose_pairs(
        pairs,
        k,
        on=on,
        method=method,
        seed=seed,
        out=out,
        device=device,
        strict=strict,
        outside=outside,
        columns=parse_columns(column),
    )
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
    say(f"Chose {done.chosen:,} of {done.candidates:,} rows by {method} on {done.modality} latents ({done.encoder}).")
    if done.chosen < k:
        say("There are no more rows.")
    elif method == "k-dpp" and done.chosen > done.distinct:
        say(f"They have only {done.distinct:,} distinct {done.modality} items, so some repeat.")
    if done.pairs.split is None:
        say("The table has no `split` column, so test rows will be taken from the chosen ones.")
    elif done.kept:
        say(f"Kept unchanged: {', '.join(f'{count:,} {split}' for split, count in done.kept.items())}.")
    say(f"Table:  {out}")
    say(f"Next:   bridgekit align --pairs {shlex.quote(str(out))}{' --outside' if done.leads_outside(out) else ''}")
