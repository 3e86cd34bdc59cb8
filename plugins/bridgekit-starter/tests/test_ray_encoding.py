"""Two Ray workers give the latents, and the complaints, of this machine. In the starter's tests: workers need a real plugin."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bridgekit.encoders import Item
from bridgekit.errors import BridgekitError
from bridgekit.latents import encode_items
from bridgekit.plugins import load_encoder
from bridgekit.ray_encoding import on_ray, ray_cluster

pytest.importorskip("ray", reason="Ray is not installed: pip install 'bridgekit[ray]'")
TEXTS: list[Item | None] = [f"{word} number {number}" for number in range(80) for word in ("kettle", "an iron gate")]
TEXTS[30] = "half a \ud83d pair"
TEXTS[31] = None


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_cluster():
        yield


def test_two_workers_give_the_latents_of_this_machine_and_name_the_same_failures(cluster: None, tmp_path: Path) -> None:
    encoder = load_encoder("starter:text", "cpu")
    here = encode_items(encoder, TEXTS, folder=tmp_path / "here")
    seen: list[tuple[int, int]] = []
    there = encode_items(
        encoder,
        TEXTS,
        folder=tmp_path / "there",
        elsewhere=on_ray("starter:text", "text", workers=2),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert there.encoded == here.encoded == len(TEXTS) - 2
    assert there.failed == here.failed
    assert set(there.failed) == {30}
    assert there.fingerprint == here.fingerprint
    assert (there.ids == here.ids).all()
    torch.testing.assert_close(there.matrix, here.matrix, rtol=0, atol=1e-5)
    assert seen[0] == (0, len(TEXTS) - 1)
    assert seen[-1] == (len(TEXTS) - 1, len(TEXTS) - 1)
    again = encode_items(encoder, TEXTS, folder=tmp_path / "there")
    assert again.encoded == 0
    assert torch.equal(again.matrix, there.matrix)


def test_a_worker_that_cannot_open_the_encoder_is_one_clear_message(cluster: None, tmp_path: Path) -> None:
    encoder = load_encoder("starter:text", "cpu")
    with pytest.raises(BridgekitError, match="no model") as caught:
        encode_items(encoder, ["dog"], folder=tmp_path, elsewhere=on_ray("starter:nothing", "text", workers=1))
    assert "a Ray worker" in caught.value.what
    assert "choose one of" in str(caught.value.remedy)
