"""What commit ee03385 wrote still opens, and gives the same numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from bridgekit import Bridge
from bridgekit.latents.encode import encode_items
from tests.toys import NAMES

OLD = Path(__file__).parent / "made_at_ee03385"
CLIPS = [OLD / "clips" / f"{name}.wav" for name in NAMES[:5]]


@pytest.fixture
def bridge(toy: object, own_cache: Path) -> Bridge:
    """The old bridge, beside a copy of the latent store of its time."""
    shutil.copytree(OLD / "home", own_cache, dirs_exist_ok=True)
    return Bridge.load(OLD / "bridge")


def test_an_old_bridge_still_gives_the_same_embeddings_and_hits(bridge: Bridge) -> None:
    expected = np.load(OLD / "expected.npz")
    np.testing.assert_allclose(bridge.embed("audio", CLIPS), expected["audio"], atol=1e-6)
    np.testing.assert_allclose(bridge.embed("text", NAMES[:5]), expected["text"], atol=1e-6)
    found = bridge.search("audio", CLIPS, "text", NAMES, k=3)
    for hits, known in zip(found, json.loads((OLD / "hits.json").read_text()), strict=True):
        assert [hit.item for hit in hits] == [item for item, _ in known]
        np.testing.assert_allclose([hit.similarity for hit in hits], [similarity for _, similarity in known], atol=1e-6)


def test_old_latents_are_read_rather_than_encoded_again(bridge: Bridge) -> None:
    assert encode_items(bridge.encoder("audio"), CLIPS).encoded == 0
    assert encode_items(bridge.encoder("text"), NAMES).encoded == 0
