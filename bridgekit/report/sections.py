"""The sections of a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from bridgekit.bridge.bridge import Bridge
from bridgekit.bridge.card import story_lines
from bridgekit.encoders import Item
from bridgekit.pictures import best_epoch, similarities
from bridgekit.report import charts
from bridgekit.report.cases import Case, right_answers
from bridgekit.report.charts import decimals
from bridgekit.report.items import Media
from bridgekit.report.markup import Child, Html, data_block, joined, tag
from bridgekit.report.previews import LIMIT_BYTES
from bridgekit.report.shown import KS, Shown
from bridgekit.report.space_map import Point
from bridgekit.report.verdict import beside, interval, listed

#: Pairs on a heat map, and items a side whose cosines are counted.
HEAT_ITEMS = 30
SPREAD_ITEMS = 1_000
#: Rows set aside that are shown one by one.
SHOWN = 20


def recall_section(shown: Sequence[Shown]) -> Html | None:
    """Charts and the table of recall, beside the baselines and chance."""
    if not any(table.records for table in shown):
        return tag("p", "It was not measured: no row that was held out has two modalities.")
    figures = []
    for number, table in enumerate(shown):
        for place, record in enumerate(r for r in table.records if r["method"] == "FuseMix" and r["among"] == "split"):
            title = f"{record['split']}, {record['direction']}"
            among = f"{record['queries']:,} queries among {record['candidates']:,}"
            by_chance = table.by_chance[record["split"], record["direction"], "split"]
            chart = charts.recall_bars(f"recall-{number}-{place}", beside(table.records, record), by_chance, title)
            figures.append(tag("figure", tag("figcaption", tag("strong", title), f" {among}"), chart))
    methods = list(dict.fromkeys(record["method"] for table in shown for record in table.records))
    legend = tag(
        "ul",
        *(tag("li", tag("span", class_=f"swatch {method.lower()}"), _METHODS.get(method, method)) for method in methods),
        tag("li", tag("span", class_="swatch chance"), "chance: a ranking at random"),
        class_="legend",
    )
    note = (
        "recall@k: the share of queries with a right candidate among the first k. Among: how many candidates; first those of "
        "the split, then all of the table. In brackets: the 95 % interval for so many queries (Wilson)."
    )
    return joined(legend, tag("div", figures, class_="charts"), _recall_table(shown), tag("p", note, class_="note"))


_METHODS = {
    "FuseMix": "FuseMix: this bridge",
    "linear": "linear: ridge regression on the same pairs",
    "untrained": "untrained: the adapters before their first step",
}


def _recall_table(shown: Sequence[Shown]) -> Html:
    bodies = []
    for table in shown:
        groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
        for record in table.records:
            groups.setdefault((record["split"], record["direction"], record["among"]), []).append(record)
        for key, records in groups.items():
            random = {"method": "chance", **{f"recall@{k}": share for k, share in table.by_chance[key].items()}}
            first = records[0]
            # Which question, once for the rows about it.
            question = joined(
                tag("th", tag("bdi", key[0]), scope="rowgroup", rowspan=len(records) + 1),
                tag("th", key[1], scope="rowgroup", rowspan=len(records) + 1),
                tag("td", f"{first['candidates']:,}", rowspan=len(records) + 1, class_="number"),
            )
            rows = []
            for number, record in enumerate([random, *records]):
                cells = [_share(record, f"recall@{k}", first["queries"]) for k in KS]
                rank = f"{record['median_rank']:g}" if "median_rank" in record else "–"
                row = [tag("th", record["method"], scope="row"), *cells, tag("td", rank, class_="number")]
                ours = "ours" if record["method"] == "FuseMix" else None
                rows.append(tag("tr", question if number == 0 else None, row, class_=ours))
            bodies.append(tag("tbody", rows))
    names = ["split", "query → answer", "among", "method", *(f"recall@{k}" for k in KS), "median rank"]
    whole = _table("Recall, in %", names, bodies)
    # A long one would stand between the charts and all that follows.
    return whole if len(bodies) <= 4 else tag("details", tag("summary", "All figures, in a table"), whole)


def _share(record: Mapping[str, Any], key: str, queries: int) -> Html:
    low, high = interval(record[key], queries)
    told = f"({100 * low:.0f}–{100 * high:.0f})" if record["method"] == "FuseMix" else ""
    return tag("td", f"{100 * record[key]:.1f}", tag("small", told), class_="number")


def _table(caption: str, names: Sequence[str], bodies: Child) -> Html:
    """A table with a caption and a header, in a box of its own that scrolls."""
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in names)))
    return _scrolling(caption, tag("table", tag("caption", caption), head, bodies))


def _scrolling(name: str, content: Html) -> Html:
    """Content that may be wider than a phone: it scrolls in itself, by keyboard too."""
    return tag("div", content, class_="scrolling", role="region", aria_label=name, tabindex=0)


Cases = Mapping[tuple[str, str, str], tuple[Sequence[Case], Sequence[Case]]]


def items_of(cases: Cases) -> list[tuple[str, Item]]:
    """Every item of the cases, with its modality."""
    return [
        (modality, item)
        for (_, query, answer), lists in cases.items()
        for case in (*lists[0], *lists[1])
        for modality, item in ((query, case.query), (answer, case.found), (answer, case.right))
    ]


def retrievals_section(cases: Cases, media: Media) -> Html | None:
    """What was asked, what was found and what was right, in each direction."""
    told = []
    for number, ((split, query, answer), (worst, best)) in enumerate(cases.items()):
        missed = any(case.rank > 1 for case in worst)
        lists = [
            ("Worst" if missed else "Closest: nothing was missed", worst),
            ("Best", best),
        ]
        content = tag(
            "div",
            *(
                tag("div", tag("h3", title), tag("ol", *(_case(case, query, answer, media) for case in listed), class_="cases"))
                for title, listed in lists
            ),
            class_="columns",
        )
        told.append(tag("details", tag("summary", f"{query} → {answer} ({split})"), content, open=number < 2))
    note = (
        "Ordered by margin: the cosine of the right answer less that of the best wrong one. Candidates are all of the split. "
        "A right answer stands in a list once."
    )
    return joined(tag("p", note, class_="note"), told) if told else None


def _case(case: Case, query: str, answer: str, media: Media) -> Html:
    def cell(heading: str, modality: str, item: Item, figures: str | None = None) -> Html:
        return tag(
            "div", tag("h4", heading), media.show(modality, item), tag("p", figures, class_="figures") if figures else None
        )

    asked = cell("asked with", query, case.query)
    if case.rank == 1:
        return tag("li", asked, cell("found, and right", answer, case.found, f"cosine {decimals(case.found_cosine)}"))
    return tag(
        "li",
        asked,
        cell("found", answer, case.found, f"cosine {decimals(case.found_cosine)}"),
        cell("right", answer, case.right, f"cosine {decimals(case.right_cosine)}, rank {case.rank:,}"),
    )


# Points are drawn in a square of so many units, with a margin for the outermost.
_SQUARE, _MARGIN = 1_000, 30
_SHAPES = ("circle", "square", "triangle", "diamond")


def space_section(bridge: Bridge, points: Sequence[Point], media: Media, unseen: bool) -> Html | None:
    """The map, its legend, and the place where a point is shown."""
    if not points:
        return None
    modalities = list(bridge.sides)
    size = 12 if len(points) < 150 else 9 if len(points) < 400 else 7 if len(points) < 900 else 6
    places = [tuple(_MARGIN + each * (_SQUARE - 2 * _MARGIN) for each in (point.x, point.y)) for point in points]
    marks, items = [], []
    for number, (point, (x, y)) in enumerate(zip(points, places, strict=True)):
        kind = modalities.index(point.modality)
        named = media.name(point.modality, point.item)
        marks.append(
            tag(
                "path",
                d=_mark(_SHAPES[kind % len(_SHAPES)], x, y, size),
                class_=f"point series-{kind % len(charts.SERIES)}",
                role="button",
                tabindex=0 if number == 0 else -1,
                aria_label=f"{point.modality}: {named}",
            )
        )
        items.append(
            {
                "modality": point.modality,
                "name": named,
                "at": [round(x, 1), round(y, 1)],
                "media": media.number.get((point.modality, point.item)),
                "partners": [[other, round(cosine, 3)] for other, cosine in zip(point.partners, point.cosines, strict=True)],
            }
        )
    shown = Counter(point.modality for point in points)
    legend = tag(
        "ul",
        *(
            tag(
                "li",
                tag(
                    "svg",
                    tag("path", d=_mark(_SHAPES[kind % len(_SHAPES)], 8, 8, 6), class_=f"series-{kind % len(charts.SERIES)}"),
                    viewBox="0 0 16 16",
                    aria_hidden="true",
                ),
                f"{modality} ({shown[modality]:,})",
            )
            for kind, modality in enumerate(modalities)
            if shown[modality]
        ),
        class_="legend",
    )
    sounds = any(media.previews[key].kind == "audio" for key in media.number)
    tools = tag(
        "div",
        legend,
        tag("label", "Find ", tag("input", type="search", id="find", autocomplete="off")),
        tag("label", tag("input", type="checkbox", id="sound", checked=True), " play clips on hover") if sounds else None,
        tag("output", id="found", aria_live="polite"),
        class_="tools",
    )
    drawing = tag(
        "svg",
        tag("g", id="links", aria_hidden="true"),
        tag("g", marks),
        id="points",
        viewBox=f"0 0 {_SQUARE} {_SQUARE}",
        role="group",
        aria_label=f"Map of {len(points):,} items. Arrow keys go from point to point, Enter plays a clip.",
    )
    hint = tag("p", "Point at the map, tap it, or go through it with Tab and the arrow keys. A click keeps a point here.")
    which = f"{len(points):,} items{' that training never saw' if unseen else ''}"
    note = (
        f"{which}, of all modalities: PCA to 50 dimensions, then t-SNE (seed 0). What is near is alike; the axes and the size "
        "of gaps mean nothing. Lines join what belongs together."
    )
    lacking = [point for point in points if isinstance(point.item, Path) and (point.modality, point.item) not in media.number]
    left_out = (
        f" {len(lacking):,} of {sum(isinstance(point.item, Path) for point in points):,} files have a name only: a page embeds "
        f"{LIMIT_BYTES // 1_000_000} MB of clips (of which the first 10 s) and pictures, at most."
        if lacking
        else ""
    )
    return joined(
        tag("p", note + left_out, class_="note"),
        tools,
        tag("div", drawing, tag("div", hint, id="card", aria_live="polite"), class_="map"),
        data_block("items", items),
    )


def _mark(shape: str, x: float, y: float, size: float) -> str:
    """The path of a point at (x, y)."""
    if shape == "circle":
        return f"M{x - size:.1f} {y:.1f}a{size} {size} 0 1 0 {2 * size} 0a{size} {size} 0 1 0 {-2 * size} 0z"
    if shape == "square":
        side = round(1.75 * size, 1)
        return f"M{x - side / 2:.1f} {y - side / 2:.1f}h{side}v{side}h{-side}z"
    if shape == "triangle":
        return f"M{x:.1f} {y - 1.2 * size:.1f}l{1.15 * size:.1f} {2 * size:.1f}h{-2.3 * size:.1f}z"
    half = round(1.3 * size, 1)
    return f"M{x:.1f} {y - half:.1f}l{half} {half}l{-half} {half}l{-half} {-half}z"


def similarity_section(bridge: Bridge, shown: Sequence[Shown], media: Media) -> Html | None:
    """Heat maps and cosines of held-out pairs, and the gap between modalities."""
    figures: list[Html] = []
    cells: dict[str, Any] = {}
    for number, table in enumerate(shown):
        held_out = table.held_out
        for a, b in combinations(held_out.ids, 2):
            rows = np.flatnonzero((held_out.ids[a] >= 0) & (held_out.ids[b] >= 0))
            if not len(rows):
                continue
            name = f"{number}-{len(figures)}"
            compared = similarities(bridge, held_out, a, b, rows, HEAT_ITEMS, media.short_name)
            drawing = _scrolling(
                f"Heat map of {a} and {b}. Arrow keys go from cell to cell.", charts.heat(f"heat-{name}", compared, a, b)
            )
            caption = f"Cosine of {a} and {b}: what belongs together is on the diagonal."
            cell = tag("output", "Point at a cell to read it.", aria_live="polite")
            figures.append(tag("figure", tag("figcaption", caption), drawing, cell, class_="heat", data_heat=f"heat-{name}"))
            values = [[decimals(value) for value in row] for row in compared.matrix.tolist()]
            cells[f"heat-{name}"] = {"rows": compared.rows, "columns": compared.columns, "values": values}
            together, apart = _cosines(table, a, b)
            if len(apart):
                spread = charts.cosine_histogram(f"spread-{name}", together, apart, a, b)
                mean, others = decimals(together.mean()), decimals(apart.mean())
                told = f"Pairs that belong together have a mean cosine of {mean}, all others {others}."
                figures.append(tag("figure", tag("figcaption", told), spread))
    gaps = bridge.provenance.get("modality_gap", {})
    if not figures and not gaps:
        return None
    rows_told = [
        tag(
            "tr",
            tag("th", listed(pair.split(", ")), scope="row"),
            tag("td", f"{gap:.3f}", class_="number"),
            tag("td", _or_dash(bridge.provenance.get("pair_cosine", {}).get(pair)), class_="number"),
        )
        for pair, gap in gaps.items()
    ]
    names = ("modalities", "distance of their means", "mean cosine of pairs in val")
    caption = "The gap between modalities (Liang et al., 2022)"
    return joined(
        tag("div", figures, class_="heats"),
        data_block("heats", cells),
        _table(caption, names, tag("tbody", rows_told)) if gaps else None,
    )


def _or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _cosines(table: Shown, a: str, b: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines of held-out pairs that belong together, and of some that do not."""
    rows = np.arange(len(table.held_out.pairs))
    right = right_answers(table.held_out, rows, a, b)
    left, other = (np.unique(ids)[:SPREAD_ITEMS] for ids in (right.query, right.candidate))
    matrix = (table.embedded[a][torch.from_numpy(left)] @ table.embedded[b][torch.from_numpy(other)].T).numpy()
    belongs = np.zeros(matrix.shape, dtype=bool)
    known = np.isin(right.query, left) & np.isin(right.candidate, other)
    belongs[np.searchsorted(left, right.query[known]), np.searchsorted(other, right.candidate[known])] = True
    return matrix[belongs], matrix[~belongs]


def training_section(bridge: Bridge) -> Html | None:
    """Loss and recall over the epochs, and the hyperparameters."""
    history = bridge.history
    if not history:
        return None
    names = [name for name in history[0] if name.startswith("recall@")]
    # A chart for each two modalities: both directions, at 1 and at 10.
    pairs: dict[frozenset[str], list[str]] = {}
    for name in names:
        pairs.setdefault(frozenset(name.split(" ", 1)[1].split(" → ")), []).append(name)
    figures = [tag("figure", tag("figcaption", "Loss: InfoNCE on mixed training pairs"), charts.loss_curve("loss", history))]
    for number, (pair, own) in enumerate(pairs.items()):
        title = f"Recall on validation rows: {listed([side for side in bridge.sides if side in pair])}"
        figures.append(tag("figure", tag("figcaption", title), charts.recall_curves(f"curve-{number}", history, own, title)))
    preset = {
        key.replace("_", " "): value for key, value in vars(bridge.preset).items() if isinstance(value, int | float | str)
    }
    told = f"Epoch {best_epoch(history):g} had the best recall on the validation rows, and its adapters were kept."
    return joined(
        tag("p", told),
        tag("div", figures, class_="charts"),
        tag(
            "details",
            tag("summary", "Hyperparameters"),
            _definitions({**preset, "learned temperature": f"{bridge.temperature:.4f}"}),
        ),
    )


def _definitions(values: Mapping[str, Child]) -> Html:
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in values.items()))


class Finding(Protocol):
    """One thing that is wrong with a table: how bad it is, what it is, what to do about it, and the rows it is about."""

    @property
    def grade(self) -> str:
        """`error`, `warning` or `note`."""

    @property
    def what(self) -> str:
        """One sentence."""

    @property
    def remedy(self) -> str:
        """What to do about it."""

    @property
    def items(self) -> Sequence[str]:
        """A line for each row or item."""


def _finding(finding: Finding) -> Html:
    rows = [tag("li", tag("bdi", line)) for line in finding.items[:SHOWN]]
    more = len(finding.items) - len(rows)
    listed_rows = tag("ul", rows, tag("li", f"and {more:,} more") if more > 0 else None)
    sentence = joined(tag("strong", finding.grade), f": {finding.what}. {finding.remedy[:1].upper()}{finding.remedy[1:]}.")
    return tag("li", tag("details", tag("summary", sentence), listed_rows) if rows else tag("p", sentence))


def data_section(shown: Sequence[Shown], findings: Sequence[Finding] = ()) -> Html:
    """The tables: how many rows, which were set aside, and what a look at the data found."""
    told: list[Child] = []
    if findings:
        told.append(tag("ul", *(_finding(finding) for finding in findings), class_="findings"))
    for table in shown:
        rows = ", ".join(f"{count:,} {split}" for split, count in table.rows.items())
        told.append(_definitions({"table": tag("bdi", table.source), "rows": rows}))
        set_aside = sorted(table.held_out.pairs.set_aside, key=lambda row: row.row)
        if not set_aside:
            told.append(tag("p", "No row had to be set aside."))
            continue
        names = ("row", "column", "item", "reason")
        body = [
            tag(
                "tr",
                tag("td", row.row, class_="number"),
                *(tag("td", tag("bdi", each)) for each in (row.column, row.item, row.reason)),
            )
            for row in set_aside[:SHOWN]
        ]
        caption = f"{len(set_aside):,} rows were set aside" + (f"; the first {SHOWN}:" if len(set_aside) > SHOWN else "")
        told.append(_table(caption, names, tag("tbody", body)))
    return joined(told)


def provenance_section(bridge: Bridge) -> Html:
    """Encoders, versions, machine, and the command that makes the bridge again."""
    sides = [
        tag(
            "tr",
            tag("th", modality, scope="row"),
            tag("td", tag("code", side.encoder)),
            tag("td", tag("code", side.revision)),
            tag("td", side.dim, class_="number"),
            tag("td", "frozen: its latents are the space" if side.frozen else "trained"),
        )
        for modality, side in bridge.sides.items()
    ]
    names = ("modality", "encoder", "revision", "width", "adapter")
    stories = [bridge.provenance, *bridge.provenance.get("bound", ())]
    told: list[Child] = [_table("Encoders", names, tag("tbody", sides))]
    for story in stories:
        if "command" in story:
            told.append(tag("h3", f"To bind {story['modality']} again" if "modality" in story else "To make it again"))
            told.append(tag("pre", tag("code", story["command"]), tabindex=0))
        told.append(_definitions(_story(story)))
    return joined(told)


def _story(story: Mapping[str, Any]) -> dict[str, Child]:
    """A bridge's provenance, but for what stands elsewhere."""
    elsewhere = ("bound", "command", "modality_gap", "pair_cosine")
    lines = story_lines({key: value for key, value in story.items() if key not in elsewhere})
    return {name: value for name, _, value in (line.partition(": ") for line in lines)}
