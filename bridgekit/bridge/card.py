"""The model card that lies in a bridge's folder."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from bridgekit.plain import markdown, plain

if TYPE_CHECKING:
    from bridgekit.bridge.bridge import Bridge


def model_card(bridge: Bridge, name: str, pictures: Sequence[str]) -> str:
    """The text of a bridge's `README.md`."""
    story = bridge.provenance
    lines = [
        f"# {markdown(name)}",
        "",
        "A bridge made by bridgekit (not the package of that name on PyPI): "
        f"{' and '.join(bridge.sides)} in one space of {bridge.dim} dimensions.",
        "",
        "| modality | encoder | width | side |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {markdown(modality)} | {_code(side.encoder)} | {side.dim} "
        f"| {'frozen (its latents are the space)' if side.frozen else 'adapter'} |"
        for modality, side in bridge.sides.items()
    ]
    lines += ["", "## How it was made", ""]
    lines += [f"{line[: len(line) - len(line.lstrip())]}- {markdown(line.lstrip())}" for line in story_lines(story)]
    lines += [f"- temperature: {bridge.temperature:.4f}"]
    if bridge.metrics:
        lines += ["", "## What it does", "", metrics_table(bridge.metrics), ""]
        lines += ["`recall@k`: the share of queries with a right candidate among the first k, on rows that training never saw."]
    lines += ["", *[f"![{markdown(Path(picture).stem.replace('-', ' '))}]({quote(picture)})" for picture in pictures]]
    lines += [
        "",
        "## Use",
        "",
        "```python",
        "from bridgekit import Bridge",
        "",
        f"bridge = Bridge.load({json.dumps(plain(name), ensure_ascii=False)})",
        *[
            f'{modality if modality.isidentifier() else "vectors"} = bridge.embed("{modality}", [...])'
            for modality in bridge.sides
        ],
        "```",
        "",
    ]
    return "\n".join(lines)


def _code(text: str) -> str:
    """As code that no pipe or backtick of it ends."""
    shown = plain(text).replace("`", "'").replace("|", "\\|")
    return f"`{shown}`"


def story_lines(story: Mapping[str, Any]) -> list[str]:
    """A bridge's provenance, a line each; below a modality that was bound to it later stands its own, indented."""
    lines = []
    for key, value in story.items():
        if key == "bound":
            for bound in value:
                lines += [f"bound later: {bound['modality']}", *(f"  {line}" for line in story_lines(bound))]
        elif key not in ("fingerprint", "modality"):
            lines.append(f"{key.replace('_', ' ')}: {_told(value)}")
    return lines


def _told(value: object) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {each}" for key, each in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def metrics_table(metrics: Sequence[Mapping[str, Any]]) -> str:
    """The records of `evaluate_splits` as a Markdown table."""
    rows = [
        "| split | direction | among | method | recall@1 | recall@5 | recall@10 | median rank |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in metrics:
        recalls = " | ".join(f"{100 * record[f'recall@{k}']:.1f} %" for k in (1, 5, 10))
        rows.append(
            f"| {markdown(record['split'])} | {markdown(record['direction'])} | {record['candidates']:,} "
            f"| {markdown(record['method'])} "
            f"| {recalls} | {record['median_rank']:g} |"
        )
    return "\n".join(rows)


def command_line() -> str:
    """The command that is running, for provenance."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv and sys.argv[0] else "python"
