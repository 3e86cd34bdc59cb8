"""The report as one HTML file: what it shows is gathered here once, and rendered by the templates beside this module."""

from __future__ import annotations

import base64
import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any
from unicodedata import east_asian_width

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from bridgekit.bridge.bridge import Bridge
from bridgekit.bridge.provenance import provenance_text
from bridgekit.checks.findings import Finding
from bridgekit.encoders import Item
from bridgekit.latents.encoded import EncodedPairs
from bridgekit.progress import Report, silent
from bridgekit.report.plots import Cosines, Similarities, best_epoch, cosines, similarities
from bridgekit.report.previews import LIMIT_BYTES, Names, Preview, make_previews
from bridgekit.report.space_map import Point, shared_space
from bridgekit.report.tables import KS, Case, Direction, TableResults, table_results, worst_and_best

#: The report's file name in a bridge's folder.
FILE = "report.html"
#: This many of the worst and of the best retrievals in each direction.
CASES = 5
#: Pairs on a heat map.
HEAT_ITEMS = 30
#: Section to its title. The template of a section that has nothing to show renders as blank, and the section is left out.
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


@dataclass(frozen=True)
class Contents:
    """Everything that a report shows.

    Arguments:
        name: of the bridge.
        bridge: the bridge: its encoders, provenance, history and hyperparameters.
        tables: the tables and the recall measured on them.
        retrievals: each direction within the tables' shown splits with its worst and best cases, lowest recall first.
        points: the map.
        similarities: for each table and two modalities, some similarities, and the distribution of all.
        findings: what is wrong with the tables, the worst first.
        names: of all items shown.
        previews: of those that can be seen or heard.
    """

    name: str
    bridge: Bridge
    tables: Sequence[TableResults]
    retrievals: Sequence[tuple[Direction, Sequence[Case], Sequence[Case]]]
    points: Sequence[Point]
    similarities: Sequence[tuple[Similarities, Cosines]]
    findings: Sequence[Finding]
    names: Names
    previews: Mapping[tuple[str, Item], Preview]

    @property
    def map_items(self) -> list[dict[str, Any]]:
        """The points for the page's script, in a square of 1,000 units with a margin for the outermost."""
        return [
            {
                "modality": point.modality,
                "name": self.names.name(point.modality, point.item),
                "at": [_place(point.x, 0, 1, 30, 970), _place(point.y, 0, 1, 30, 970)],
                "media": preview.number if (preview := self.previews.get((point.modality, point.item))) else None,
                "partners": [[other, round(cosine, 3)] for other, cosine in point.partners.items()],
            }
            for point in self.points
        ]


def report_page(
    bridge: Bridge, name: str, tables: Sequence[TableResults], *, findings: Sequence[Finding] = (), report: Report = silent
) -> bytes:
    """The report as one HTML file in UTF-8 that needs no network: the same bytes for the same bridge.

    Arguments:
        bridge: the bridge.
        name: what to call it.
        tables: its tables, as `table_results` gives them.
        findings: what is wrong with the tables, the worst first.
        report: progress.
    """
    report("writing the report", 0, 1)
    retrievals = [
        (each, *worst_and_best(table.held_out, table.embedded, each.query, each.answer, CASES))
        for table in tables
        for each in table.measured
        if each.split == table.split
    ]
    retrievals.sort(key=lambda each: each[0].records["FuseMix"]["recall@5"])
    points = shared_space([(table.held_out, table.embedded) for table in tables])
    items = [
        (modality, item)
        for way, worst, best in retrievals
        for case in (*worst, *best)
        for modality, item in ((way.query, case.query), (way.answer, case.found), (way.answer, case.correct))
    ]
    items += [(point.modality, point.item) for point in points]
    names = Names(items)
    compared = [
        (some, cosines(table, a, b))
        for table in tables
        for a, b in combinations(table.held_out.ids, 2)
        if (some := similarities(bridge, table.held_out, a, b, HEAT_ITEMS, names))
    ]
    previews = make_previews(items, report=report)
    page = render(Contents(name, bridge, tables, retrievals, points, compared, findings, names, previews))
    report("writing the report", 1, 1)
    return page


def render(contents: Contents) -> bytes:
    """The HTML of a report. Everything in it is escaped: names, texts and metadata may be a stranger's."""
    sections = {name: _TEMPLATES.get_template(f"{name}.html.j2").render(report=contents) for name in SECTIONS}
    style, script = (Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    page = _TEMPLATES.get_template("page.html.j2").render(
        report=contents,
        sections={name: Markup(content) for name, content in sections.items() if content.strip()},
        style=Markup(style),
        script=Markup(script),
    )
    # A file's name may hold bytes that are no text.
    return page.encode("utf-8", "replace")


def report_or_warning(
    bridge: Bridge, name: str, encoded: EncodedPairs, split: NDArray[np.str_], report: Report = silent
) -> dict[str, bytes]:
    """The report's file name and bytes, for the folder of a bridge that has just been trained.

    If it cannot be made, nothing, and a line on standard error: hours of training are not lost for a page.
    """
    try:
        tables = [table_results(bridge, encoded, split.tolist(), bridge.metrics)]
        return {FILE: report_page(bridge, name, tables, report=report)}
    except Exception as error:
        print(f"bridgekit: the report could not be made: {type(error).__name__}: {error}", file=sys.stderr)
        return {}


# ---- what the templates compute with


def _decimals(value: float, places: int = 2) -> str:
    """A number with a true minus sign, and none before zero."""
    return f"{round(float(value), places) + 0.0:.{places}f}".replace("-", "−")


def _interval(share: float, queries: int) -> tuple[float, float]:
    """The 95% confidence interval of a share of some queries (Wilson, 1927)."""
    from scipy.stats import binomtest

    count = max(1, queries)  # a stranger's metrics may say 0
    low, high = binomtest(round(share * count), count).proportion_ci(method="wilson")
    return low, high


def _place(value: float, low: float, high: float, start: float, end: float) -> float:
    """Where a value stands on an axis that runs from `low` at `start` to `high` at `end`."""
    return round(start + (value - low) / ((high - low) or 1) * (end - start), 1)


def _text_width(labels: Iterable[str]) -> float:
    """About how wide the widest of some texts is, in units of its font size: Chinese characters are wider than Latin ones."""
    return max(sum(1 if east_asian_width(character) in "WF" else 0.53 for character in label) for label in labels)


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
    "interval": _interval,
    "number": "{:,}".format,
    "pairs": lambda items: list(combinations(items, 2)),
    "percent": lambda share: f"{100 * share:.1f}%",
    "place": _place,
    "provenance_text": provenance_text,
    "text_width": _text_width,
    "sha256": lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode(),
    "ticks": _ticks,
}
