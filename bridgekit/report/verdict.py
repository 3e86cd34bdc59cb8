"""How well a bridge does, in one sentence, and what a reader should know before believing it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from bridgekit.bridge.bridge import Bridge
from bridgekit.evaluation.recall import sides_of
from bridgekit.pictures import best_epoch
from bridgekit.report.markup import Html, tag
from bridgekit.report.shown import Shown

#: Fewer queries than this say little.
FEW = 30


def verdict(shown: Sequence[Shown]) -> str:
    """How well it does, in one sentence of figures: the worst and the best direction, beside regression and chance."""
    told = [
        (table, record)
        for table in shown
        for record in table.records
        if record["method"] == "FuseMix" and record["among"] == "split" and record["split"] == table.split
    ]
    if not told:
        return "No row was held out for a test, so that it is not known how well this bridge does."
    told.sort(key=lambda pair: pair[1]["recall@5"])
    sentences = [_sentence(table, record) for table, record in ([told[0], told[-1]] if len(told) > 1 else told)]
    if len(told) > 2:
        return f"At worst, {sentences[0]}; at best, {sentences[1]}."
    return f"O{'; '.join(sentences)[1:]}."


def _sentence(table: Shown, record: Mapping[str, Any]) -> str:
    query, answer = record["direction"].split(" → ")
    by_chance = table.by_chance[record["split"], record["direction"], "split"]
    k = telling(by_chance)
    others = {each["method"]: percent(each[f"recall@{k}"]) for each in beside(table.records, record)}
    linear = f"linear regression {others['linear']}, " if "linear" in others else ""
    place = "first" if k == 1 else f"among the first {k}"
    return (
        f"of {record['queries']:,} {query} queries, {percent(record[f'recall@{k}'])} find the right {answer} {place} "
        f"of {record['candidates']:,} ({linear}chance {percent(by_chance[k])})"
    )


def telling(by_chance: Mapping[int, float]) -> int:
    """The k whose recall says most: where any ranking has many right among its first five, that is 1."""
    return 5 if by_chance[5] < 0.1 else 1


def beside(records: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The records of all methods on the same question."""
    same = ("split", "direction", "among")
    return [each for each in records if all(each[key] == record[key] for key in same)]


def interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` queries (Wilson, 1927)."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def caveats(bridge: Bridge, shown: Sequence[Shown]) -> Html | None:
    """What a reader should know before believing the figures."""
    told: list[str] = []
    for table in shown:
        if not table.own:
            told.append(
                f"{table.source} is not the table that this bridge was trained on; training may have seen some of its rows."
            )
        fused = [record for record in table.records if record["method"] == "FuseMix" and record["among"] == "split"]
        for record in fused:
            where = f"{record['direction']}, {record['split']}"
            if record["queries"] < FEW:
                told.append(
                    f"{where}: only {record['queries']} queries were asked; one of them is {percent(1 / record['queries'])}."
                )
            k = telling(table.by_chance[record["split"], record["direction"], "split"])
            own = record[f"recall@{k}"]
            _, high = interval(own, record["queries"])
            for other in (each[f"recall@{k}"] for each in beside(table.records, record) if each["method"] == "linear"):
                if other > own:
                    few = f"; with {record['queries']:,} queries, that may be chance" if other <= high else ""
                    told.append(
                        f"{where}: linear regression has the higher recall@{k}, {percent(other)} to {percent(own)}{few}."
                    )
        asked = {sides_of(record) for record in table.records}
        told += [
            f"{a} and {b}: no row that was held out has both, so that how well they find each other was not measured."
            for a, b in combinations(table.held_out.ids, 2)
            if frozenset((a, b)) not in asked
        ]
        left_out = len(table.held_out.pairs.set_aside)
        if left_out:
            told.append(
                f"{left_out:,} of {left_out + sum(table.rows.values()):,} rows could not be used; they are listed below."
            )
    if bridge.history and len(bridge.history) > 1 and best_epoch(bridge.history) == bridge.history[-1]["epoch"]:
        told.append("The last epoch was the best one: with more epochs it may do better.")
    return tag("ul", *(tag("li", line) for line in told)) if told else None


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return ", ".join(words[:-1]) + f" and {words[-1]}" if len(words) > 1 else "".join(words)


def percent(share: float) -> str:
    """A share in per cent, to a tenth."""
    return f"{100 * share:.1f} %"
