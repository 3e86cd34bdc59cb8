"""The report as one HTML file: its contents are gathered here and rendered by the templates beside this module."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from bridgekit.bridge.bridge import Bridge
from bridgekit.bridge.provenance import provenance_text
from bridgekit.checks.findings import GRADES, Finding
from bridgekit.encoders import TEXT, Item
from bridgekit.errors import BridgekitError
from bridgekit.latents.encoded import EncodedPairs
from bridgekit.progress import Report, say, silent
from bridgekit.report.labels import Size, place_labels, short_labels, text_width
from bridgekit.report.plots import HEAT_ITEMS, best_epoch, cosines, similarities
from bridgekit.report.previews import LIMIT_BYTES, Names, Preview, make_previews
from bridgekit.report.space_map import Point, shared_space
from bridgekit.report.tables import KS, TableResults, table_results, worst_and_best
from bridgekit.retrieval import confidence_interval

#: The report's file name in a bridge's folder.
FILE = "report.html"
#: Number of worst, and of best, retrievals shown per direction.
CASES = 5
#: Side of the map in its own units.
MAP = 1_000
#: Class of a set of labels on the map to the height of its text and of its thumbnails in the map's units, the greatest width
#: of a text in em, and the number of labels: a narrow window shows fewer and larger ones.
LABELS = {"broad": (16, 54, 12, 48), "narrow": (34, 104, 9, 16)}
#: Section to its title. A section whose template renders as blank is left out.
SECTIONS = {
    "caveats": "Caveats",
    "recall": "Recall",
    "retrievals": "Worst and best retrievals",
    "map": "Map of the shared space",
    "similarity": "Similarity",
    "training": "Training",
    "data": "Data",
    "provenance": "Provenance",
}


def report_page(
    bridge: Bridge, name: str, tables: Sequence[TableResults], *, findings: Sequence[Finding] = (), report: Report = silent
) -> bytes:
    """The report as one HTML file in UTF-8 that needs no network: the same bytes for the same bridge.

    Arguments:
        bridge, name: the bridge and its name.
        tables: its tables, from `table_results`.
        findings: problems of the tables.

    Raises:
        BridgekitError: the bridge's history is incomplete.
    """
    report("writing the report", 0, 1)
    for record in bridge.history:
        expected = bridge.history[-1].keys() - ({"loss"} if record.get("epoch") == 0 else set())
        if record.keys() != expected or not {"epoch", "score"} <= record.keys() or "loss" not in bridge.history[-1]:
            what = "history.jsonl does not have the same numbers for every epoch, with epoch, loss and score"
            raise BridgekitError(what, where=name, remedy="copy the bridge again, or train it again")
    # Each direction within the tables' shown splits with its worst and best cases, lowest recall first.
    retrievals = [
        (each, *worst_and_best(table.held_out, table.embedded, each.query, each.answer, CASES))
        for table in tables
        for each in table.measured
        if each.split == table.split
    ]
    retrievals.sort(key=lambda each: each[0].own["recall@5"])
    points = shared_space([(table.held_out, table.embedded) for table in tables])
    items = [
        (modality, item)
        for way, worst, best in retrievals
        for case in (*worst, *best)
        for modality, item in ((way.query, case.query), (way.answer, case.found), (way.answer, case.correct))
    ]
    items += [(point.modality, point.item) for point in points]
    names, previews = Names(items), make_previews(items, report=report)
    map_items = [_map_item(point, names, previews) for point in points]
    compared = [
        (some, cosines(table, a, b))
        for table in tables
        for a, b in combinations(table.held_out.ids, 2)
        if (some := similarities(bridge, table.held_out, a, b, HEAT_ITEMS, names))
    ]
    page = _rendered(
        name=name,
        bridge=bridge,
        tables=tables,
        retrievals=retrievals,
        map_items=map_items,
        map_labels={kind: _map_labels(map_items, *how) for kind, how in LABELS.items()},
        similarities=compared,
        findings=_by_grade(findings),
        names=names,
        previews=previews,
    )
    report("writing the report", 1, 1)
    return page


def _by_grade(findings: Sequence[Finding]) -> list[tuple[str, list[Finding]]]:
    """Each grade that occurs, worst first, with its findings."""
    grades = dict.fromkeys((*GRADES, *(finding.grade for finding in findings)))
    found = [(grade, [finding for finding in findings if finding.grade == grade]) for grade in grades]
    return [(grade, some) for grade, some in found if some]


def _map_item(point: Point, names: Names, previews: Mapping[tuple[str, Item], Preview]) -> dict[str, Any]:
    """A point for the page's script, in a square of `MAP` units with a margin for the outermost."""
    preview = previews.get((point.modality, point.item))
    return {
        "modality": point.modality,
        "name": names.name(point.modality, point.item),
        "at": [_place(point.x, 0, 1, 30, MAP - 30), _place(point.y, 0, 1, 30, MAP - 30)],
        "media": preview.number if preview else None,
        "partners": [[other, round(cosine, 3)] for other, cosine in point.partners.items()],
    }


def _map_labels(items: Sequence[Mapping[str, Any]], text: int, thumbnail: int, widest: int, most: int) -> list[dict[str, Any]]:
    """Labels of a few dozen items, in the map's units: thumbnails of images and the beginnings of texts, or else names."""
    named = {TEXT} if any(item["modality"] == TEXT for item in items) else {item["modality"] for item in items} - {"image"}
    shown = {number: item["name"] for number, item in enumerate(items) if item["modality"] in named}
    shown = dict(zip(shown, short_labels(list(shown.values()), widest), strict=True))
    shown = {number: name for name, number in {name: number for number, name in shown.items()}.items()}  # each name once
    sizes: dict[int, Size] = {number: (text * text_width(name), 1.25 * text) for number, name in shown.items()}
    for number, item in enumerate(items):
        if item["modality"] == "image" and item["media"] is not None:
            shown[number], sizes[number] = "", (thumbnail, thumbnail)
    placed = place_labels(np.array([item["at"] for item in items]).reshape(-1, 2), sizes, most, 12 + text / 8, MAP)
    return [
        {"item": number, "text": shown[number], "x": round(x, 1), "y": round(y, 1), "size": sizes[number]}
        for number, (x, y) in placed.items()
    ]


def _rendered(**contents: Any) -> bytes:
    """The HTML of a report. Everything in it is escaped: names, texts and metadata are untrusted."""
    sections = {name: _TEMPLATES.get_template(f"{name}.html.j2").render(report=contents) for name in SECTIONS}
    style, script = (Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    page = _TEMPLATES.get_template("page.html.j2").render(
        report=contents,
        sections={name: Markup(content) for name, content in sections.items() if content.strip()},
        style=Markup(style),
        script=Markup(script),
    )
    return page.encode("utf-8", "replace")  # file names may contain bytes that are not UTF-8


def report_or_warning(
    bridge: Bridge, name: str, encoded: EncodedPairs, split: NDArray[np.str_], report: Report = silent
) -> dict[str, bytes]:
    """The report's file name and bytes, for the folder of a bridge that has just been trained.

    If that fails, it prints a line on standard error and returns nothing: a report is not worth losing hours of training.
    """
    try:
        tables = [table_results(bridge, encoded, split.tolist(), bridge.metrics)]
        return {FILE: report_page(bridge, name, tables, report=report)}
    except Exception as error:
        say(f"the report could not be made: {type(error).__name__}: {error}")
        return {}


# ---- filters of the templates


def _decimals(value: float, places: int = 2) -> str:
    """A number with a true minus sign, and none before zero."""
    return f"{round(float(value), places) + 0.0:.{places}f}".replace("-", "−")


def _place(value: float, low: float, high: float, start: float, end: float) -> float:
    """The coordinate of a value on an axis from `low` at `start` to `high` at `end`."""
    return round(start + (value - low) / ((high - low) or 1) * (end - start), 1)


def _ticks(values: Iterable[float], count: int = 5) -> list[float]:
    """About `count` round numbers that span some values."""
    from matplotlib.ticker import MaxNLocator

    found = list(values)
    return list(MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]).tick_values(min(found), max(found)))


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.globals |= {"KS": KS, "SECTIONS": SECTIONS, "LIMIT_MB": LIMIT_BYTES // 1_000_000}
_TEMPLATES.filters |= {
    "asdict": asdict,
    "best_epoch": best_epoch,
    "decimals": _decimals,
    "interval": confidence_interval,
    "short_labels": short_labels,
    "number": "{:,}".format,
    "pairs": lambda items: list(combinations(items, 2)),
    "percent": lambda share: f"{100 * share:.1f}%",
    "place": _place,
    "provenance_text": provenance_text,
    "text_width": text_width,
    "sha256": lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode(),
    "ticks": _ticks,
}
