"""The report as one HTML file: its head, its order, and what is embedded in it."""

from __future__ import annotations

import base64
import hashlib
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bridgekit.bridge.bridge import Bridge
from bridgekit.errors import BridgekitError
from bridgekit.latents.encoded import EncodedPairs
from bridgekit.progress import Report, progress_bars, silent
from bridgekit.recipes.check import check_pairs
from bridgekit.report.cases import worst_and_best
from bridgekit.report.items import Media
from bridgekit.report.markup import data_block, raw, tag
from bridgekit.report.previews import make_previews
from bridgekit.report.sections import (
    Finding,
    data_section,
    items_of,
    provenance_section,
    recall_section,
    retrievals_section,
    similarity_section,
    space_section,
    training_section,
)
from bridgekit.report.shown import Shown, show_bridge, show_table
from bridgekit.report.space_map import shared_space
from bridgekit.report.verdict import caveats, listed, verdict
from bridgekit.storage.cache import write_atomically

#: The report's name in a bridge's folder.
FILE = "report.html"
#: The worst and the best retrievals, so many of each in each direction.
CASES = 5


def report_page(
    bridge: Bridge, name: str, shown: Sequence[Shown], *, findings: Sequence[Finding] = (), report: Report = silent
) -> bytes:
    """The report as one HTML file in UTF-8 that needs no network: the same bytes for the same bridge.

    Arguments:
        bridge: the bridge.
        name: what to call it.
        shown: its tables, as `show_bridge` gives them.
        findings: what is wrong with the tables, the worst first.
        report: progress.
    """
    report("writing the report", 0, 4)
    cases = {
        (table.split, query, answer): worst_and_best(table.held_out, table.embedded, query, answer, CASES)
        for table in shown
        for query, answer in table.directions
    }
    report("writing the report", 1, 4)
    points = shared_space([(table.held_out, table.embedded) for table in shown])
    report("writing the report", 2, 4)
    items = [*items_of(cases), *((point.modality, point.item) for point in points)]
    media = Media(items, make_previews(items, report=report))
    report("writing the report", 3, 4)
    own = all(table.own for table in shown)
    sections = {
        "caveats": ("Before you trust it", caveats(bridge, shown)),
        "recall": ("Recall on rows that training never saw" if own else "Recall", recall_section(shown)),
        "retrievals": ("The worst and the best retrievals", retrievals_section(cases, media)),
        "map": ("Map of the shared space", space_section(bridge, points, media, own)),
        "similarity": ("Pairs that training never saw" if own else "Pairs", similarity_section(bridge, shown, media)),
        "training": ("Training", training_section(bridge)),
        "data": ("The data", data_section(shown, findings)),
        "provenance": ("Where it came from", provenance_section(bridge)),
    }
    told = {key: (title, content) for key, (title, content) in sections.items() if content}
    style, script = (files("bridgekit.report").joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        # Nothing loads from anywhere, and no script runs but the one below, whatever the table holds.
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(style, script)),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", f"{name}: a bridge's report"),
        tag("style", raw(style)),
    )
    top = tag(
        "header",
        tag("div", tag("h1", tag("bdi", name)), tag("button", "Dark", type="button", id="theme", hidden=True), class_="title"),
        tag("p", f"{listed(list(bridge.sides))} in one space of {bridge.dim} dimensions"),
        tag("p", verdict(shown), class_="verdict"),
        tag("nav", *(tag("a", _SHORT[key], href=f"#{key}") for key in told), aria_label="Sections"),
        tag("noscript", tag("p", "Players, thumbnails and pointing at the map need JavaScript; the figures do not.")),
    )
    main = tag(
        "main",
        *(
            tag("section", tag("h2", title, id=f"{key}-title"), content, id=key, aria_labelledby=f"{key}-title")
            for key, (title, content) in told.items()
        ),
    )
    foot = tag("footer", tag("p", f"bridgekit {bridge.provenance.get('bridgekit', '')}, {bridge.provenance.get('made', '')}"))
    body = tag("body", top, main, foot, data_block("media", media.as_json()), tag("script", raw(script)))
    report("writing the report", 4, 4)
    # A file's name may hold bytes that are no text.
    return ("<!doctype html>\n" + tag("html", head, body, lang="en")).encode("utf-8", "replace")


_SHORT = {
    "caveats": "Before you trust it",
    "recall": "Recall",
    "retrievals": "Worst and best",
    "map": "Map",
    "similarity": "Similarity",
    "training": "Training",
    "data": "Data",
    "provenance": "Provenance",
}


def _policy(style: str, script: str) -> str:
    """A Content-Security-Policy: this style, this script, what is embedded, and nothing else."""
    style_hash, script_hash = (base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in (style, script))
    return (
        "default-src 'none'; img-src data:; media-src data:; "
        f"style-src 'sha256-{style_hash}'; style-src-attr 'unsafe-inline'; script-src 'sha256-{script_hash}'; "
        "base-uri 'none'; form-action 'none'"
    )


def write_report(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    pairs: str | Path | None = None,
    check: bool = True,
    outside: bool = False,
    progress: bool = True,
) -> Path:
    """Write the report on a bridge anew, with what a check of its tables finds.

    Arguments:
        folder: the bridge's.
        out: the file; by default `report.html` in the bridge's folder.
        pairs: see `show_bridge`.
        check: look at every file of the tables, as `bridgekit check` does.
        outside: let a table name files outside its own folder.
        progress: show progress bars on standard error.

    Returns:
        where it is.

    Raises:
        BridgekitError: the bridge or its table cannot be read, or the file cannot be written.
    """
    bridge = Bridge.load(folder)
    with progress_bars(progress) as report:
        shown = show_bridge(bridge, pairs, outside=outside, report=report)
    findings: list[Finding] = []
    for table in shown if check else ():
        encoders = [bridge.sides[modality].encoder for modality in table.pairs.modalities]
        findings += check_pairs(table.pairs, more=encoders, device=bridge.device, progress=progress).findings
    with progress_bars(progress) as report:
        page = report_page(bridge, Path(folder).absolute().name, shown, findings=findings, report=report)
    file = Path(out) if out else Path(folder) / FILE
    try:
        write_atomically(file, lambda aside: aside.write_bytes(page))
    except OSError as error:
        raise BridgekitError(f"the report cannot be written: {error.strerror or error}", where=str(file)) from error
    return file


def report_or_warning(
    bridge: Bridge, name: str, encoded: EncodedPairs, split: NDArray[np.str_], report: Report = silent
) -> dict[str, bytes]:
    """The report's file name and bytes, for the folder of a bridge that has just been trained.

    Nothing, and a line on standard error, where it cannot be made: hours of training are not lost for a page.
    """
    try:
        return {FILE: report_page(bridge, name, [show_table(bridge, encoded, split.tolist(), bridge.metrics)], report=report)}
    except Exception as error:
        print(f"bridgekit: there is no report: {type(error).__name__}: {error}", file=sys.stderr)
        return {}
