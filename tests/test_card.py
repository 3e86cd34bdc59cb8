"""The model card: made of a bridge's metadata alone, with untrusted text escaped."""

from __future__ import annotations

import ast
import re
from typing import Any

import pytest
from jinja2 import UndefinedError

from bridgekit.bridge.card import model_card

HOSTILE = "<img src=x onerror=alert(1)>](http://evil) `|` ![x](http://evil)\n# owned {{ 7 * 7 }}"


def metadata(**changes: Any) -> dict[str, Any]:
    """`bridge.json` of a small bridge."""
    record = {"split": "test", "direction": "audio → text", "among": "split", "method": "FuseMix", "queries": 4}
    record |= {"candidates": 1200, "recall@1": 0.25, "recall@5": 0.5, "recall@10": 1.0, "median_rank": 2.5}
    sides = {
        "audio": {"encoder": "toy:tone", "revision": "1", "dim": 64, "frozen": False},
        "text": {"encoder": "toy:letters", "revision": "1", "dim": 48, "frozen": True},
    }
    provenance = {"pairs": "pairs.csv", "rows": {"train": 5, "test": 4}, "fingerprint": "0" * 32}
    whole = {"sides": sides, "dim": 48, "temperature": 0.07, "provenance": provenance, "metrics": [record]}
    return whole | changes


def test_a_card_gives_sides_provenance_recall_pictures_and_how_to_use_the_bridge() -> None:
    card = model_card(metadata(), "tones", ["similarity-audio-text.png"])
    lines = card.splitlines()
    assert lines[0] == "# tones"
    assert "audio, text in one 48-dimensional space." in card
    assert "| text | `toy:letters` | 48 | none: its latents are the shared space |" in lines
    assert "- rows: train: 5; test: 4" in lines
    assert "fingerprint" not in card
    assert "| test | audio → text | 1,200 | FuseMix | 5–70 | 15–85 | 51–100 | 2.5 |" in lines
    many = metadata(metrics=[{**metadata()["metrics"][0], "queries": 1200}])
    assert "| test | audio → text | 1,200 | FuseMix | 25.0 | 50.0 | 100.0 | 2.5 |" in model_card(many, "tones", []).splitlines()
    assert "![similarity audio text](similarity-audio-text.png)" in lines
    code = card.split("```")[1].removeprefix("python\n")
    assert 'Bridge.load("tones")' in code
    ast.parse(code)  # a reader can paste it
    assert card.endswith("```\n")


def test_a_bridge_that_was_not_evaluated_has_no_table_of_recall() -> None:
    assert "Evaluation" not in model_card(metadata(metrics=[]), "tones", [])


def test_a_modality_bound_later_is_listed_with_its_own_provenance() -> None:
    bound = {"modality": "image", "seed": 3, "fingerprint": "1" * 32}
    card = model_card(metadata(provenance={"seed": 1, "bound": [bound]}), "tones", [])
    assert "- seed: 1\n- bound later: image\n  - seed: 3\n" in card


def test_markup_in_metadata_is_escaped() -> None:
    told = metadata(
        sides={"audio": {"encoder": "toy:`a`|b", "revision": HOSTILE, "dim": 64, "frozen": False}},
        provenance={HOSTILE: HOSTILE, "pairs": [HOSTILE], "rows": {HOSTILE: 3}, "bound": [{"modality": HOSTILE}]},
    )
    told["metrics"] = [{**metadata()["metrics"][0], "split": HOSTILE, "direction": HOSTILE, "method": HOSTILE}]
    card = model_card(told, HOSTILE, [f"{HOSTILE}.png"])
    text, code, rest = card.split("```")
    for mark in ("<img", "](http://evil", "\n# owned", "49"):
        assert mark not in text
    assert "`toy:'a'\\|b`" in text
    assert len([line for line in text.splitlines() if line.startswith("#")]) == 4  # the template's own headings
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.replace("\\|", "").count("|") for line in rows] == [5, 5, 5, 9, 9, 9]  # no cell was broken
    ast.parse(code.removeprefix("python\n"))
    assert rest == "\n"


def test_missing_metadata_is_an_error_rather_than_a_gap_in_the_card() -> None:
    incomplete = metadata()
    del incomplete["temperature"]
    with pytest.raises((UndefinedError, TypeError)):
        model_card(incomplete, "tones", [])


@pytest.mark.parametrize("address", ["http://evil.example/a?b=1&c", "HTTPS://evil", "ftp://x.y", "www.evil.com", "me@evil.com"])
def test_bare_addresses_are_code_which_no_renderer_makes_a_link_of(address: str) -> None:
    told = metadata(
        provenance={"pairs": f"see {address}, `{address}` and ({address})", f"x{address}": 1},
        metrics=[{**metadata()["metrics"][0], "split": f"a|{address}|", "method": address}],
    )
    card = model_card(told, f"bridge {address}", [])
    text = card.partition("```")[0].replace("\\`", "").replace("\\|", "")
    pieces = text.split("`")
    assert len(pieces) % 2, "every piece of code ends"
    assert address in card
    assert not [piece for piece in pieces[::2] if re.search(r"://|www\.|\w@\w+\.\w", piece, re.IGNORECASE)]
