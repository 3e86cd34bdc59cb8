"""`bridgekit eval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bridgekit.cli.common import (
    BridgeArgument,
    Columns,
    Device,
    Json,
    Outside,
    find_bridge,
    parse_columns,
    print_metrics,
    print_set_aside,
)
from bridgekit.terminal import print_json, say

if TYPE_CHECKING:
    from bridgekit.bridge.bridge import Bridge
    from bridgekit.evaluation.bridges import EvalOptions
    from bridgekit.progress import Report

JUDGED = "For --generate:"
UNKNOWN = "This bridge has no record of its training rows. If the table contains some of them, metrics are inflated."


def command(
    bridge: BridgeArgument = None,
    pairs: Annotated[str | None, typer.Option(help="A table, folder or source. [dim]default: the bridge's own[/dim]")] = None,
    split: Annotated[
        list[str] | None, typer.Option(help="A split to evaluate; may be repeated. [dim]default: all but train and val[/dim]")
    ] = None,
    unseen: Annotated[bool, typer.Option("--unseen", help="Set aside rows seen in training, instead of failing.")] = False,
    zero_shot: Annotated[bool, typer.Option("--zero-shot", help="Zero-shot classification; texts are class names.")] = False,
    template: Annotated[
        list[str] | None, typer.Option(help="For --zero-shot: prompt template with {} for the class name; may be repeated.")
    ] = None,
    generate: Annotated[bool, typer.Option("--generate", help="Generate images and have an image encoder match them.")] = False,
    model: Annotated[
        str | None, typer.Option(help=f"{JUDGED} text-to-image model. [dim]default: starter:openmoji-64[/dim]")
    ] = None,
    gallery: Annotated[
        str | None, typer.Option(help=f"{JUDGED} table of reference images. [dim]default: starter:openmoji[/dim]")
    ] = None,
    judge: Annotated[str, typer.Option(help=f"{JUDGED} image encoder that matches the images.")] = "image",
    among: Annotated[str, typer.Option(help=f"{JUDGED} candidates: gallery (all) or queries (of test captions).")] = "gallery",
    gap: Annotated[list[str] | None, typer.Option(help=f"{JUDGED} modality gap: captions, mean or none; repeatable.")] = None,
    limit: Annotated[int, typer.Option(min=1, help=f"{JUDGED} maximum number of test items.")] = 300,
    device: Device = "auto",
    outside: Outside = False,
    column: Columns = None,
    as_json: Json = False,
) -> None:
    """Evaluate a bridge: recall@k on test splits, zero-shot classification, or generated images.

    Example: [b]bridgekit eval bridges/audio-text --pairs test.csv[/b]
    """
    from bridgekit.bridge.bridge import Bridge
    from bridgekit.evaluation.bridges import EvalOptions
    from bridgekit.progress import progress_bars

    folder = find_bridge(bridge)
    options = EvalOptions(pairs=pairs, splits=split, unseen=unseen, outside=outside, columns=parse_columns(column))
    if generate:
        from bridgekit.recipes.judge import judge_generation

        gaps = tuple(gap or ("captions",))
        records = judge_generation(
            folder,
            model=model,
            gallery=gallery,
            judge=judge,
            among=among,
            gaps=gaps,
            limit=limit,
            device=device,
            **vars(options),
        )
        _print_judged(records, as_json)
        return
    opened = Bridge.load(folder, device)
    with progress_bars() as report:
        if zero_shot:
            _print_zero_shot(opened, options, tuple(template or ()), report, as_json)
        else:
            _print_recall(opened, options, report, as_json)


def _print_recall(bridge: Bridge, options: EvalOptions, report: Report, as_json: bool) -> None:
    from bridgekit.evaluation.bridges import evaluate_bridge

    records, set_aside = evaluate_bridge(bridge, options, report)
    if as_json:
        print_json({"metrics": records, "set_aside": [vars(row) for row in set_aside]})
        return
    print_set_aside(set_aside)
    print_metrics(records, f"Recall@k on {options.pairs or ', '.join(table.source for table in bridge.tables)}, in %", bridge)
    if options.pairs and not bridge.training_rows:
        say(UNKNOWN)


def _print_zero_shot(bridge: Bridge, options: EvalOptions, templates: Sequence[str], report: Report, as_json: bool) -> None:
    from dataclasses import asdict

    from bridgekit.evaluation.zero_shot import evaluate_zero_shot
    from bridgekit.retrieval import TEMPLATES

    result = evaluate_zero_shot(bridge, options, templates or TEMPLATES, report)
    if as_json:
        print_json(asdict(result))
        return
    print_set_aside(result.set_aside)
    counts = f"{result.items} items, {len(result.per_class)} classes"
    say(f"Zero-shot {result.modality} classification: {100 * result.accuracy:.1f} % top-1 accuracy, {counts}")
    if not bridge.training_rows:
        say(UNKNOWN)
    for name, accuracy in result.per_class.items():
        say(f"  {100 * accuracy:5.1f} %  {name}")


def _print_judged(records: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json({"generated": records})
        return
    first = records[0]
    say(f"Accuracy of the judge in %, on {first['pictures']} images each, among {first['candidates']:,} candidates")
    say(f"{'made from':28}   top-1  top-5")
    for record in records:
        name = record["made_from"] + (f" (gap: {record['gap']})" if record["gap"] else "")
        say(f"{name:28}  {100 * record['top1']:6.1f} {100 * record['top5']:6.1f}")
