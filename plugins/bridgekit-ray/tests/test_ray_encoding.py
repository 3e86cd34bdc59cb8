"""Two Ray workers give the latents, and the errors, of one machine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from bridgekit_ray import encoding
from bridgekit_ray.encoding import cluster as ray_cluster
from bridgekit_ray.encoding import on_cluster
from torch import Tensor

from bridgekit.encoders import Item
from bridgekit.errors import BridgekitError
from bridgekit.latents.encode import encode_items
from bridgekit.plugins import load_encoder
from tests.toys import LetterEncoder

TEXTS: list[Item | None] = [f"{word} number {number}" for number in range(80) for word in ("kettle", "an iron gate")]
TEXTS[30] = "half a \ud83d pair"
TEXTS[31] = None


@dataclass
class Seen:
    """What a driver knows of an encoder: all but how to run it."""

    modality: str
    dim: int
    revision: str

    def prepare(self, item: Item) -> object:
        raise AssertionError("the driver does not run it")

    def encode(self, batch: Sequence[object]) -> torch.Tensor:
        raise AssertionError("the driver does not run it")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    pytest.importorskip("bridgekit_starter", reason="workers need an encoder of an installed plugin")
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
        run=on_cluster("starter:text", encoder, workers=2),
        report=lambda _, done, total: seen.append((done, total)),
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


def test_files_are_named_so_that_workers_in_another_folder_find_them(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_encoder("starter:text", "cpu")
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        Path(f"{number}.txt").write_text(f"text number {number}")
    Path("4.txt").write_bytes(b"\xff\xfe\xfd")
    files: list[Item | None] = [Path(f"{number}.txt") for number in range(5)]
    # A text encoder takes files as well; as another modality, so that workers take what they get for paths.
    seen = Seen("image", encoder.dim, encoder.revision)
    there = encode_items(seen, files, folder=tmp_path / "there", run=on_cluster("starter:text", seen, workers=1))
    here = encode_items(encoder, files, folder=tmp_path / "here")
    assert (there.encoded, there.failed) == (4, here.failed)
    assert list(there.failed) == [4]
    torch.testing.assert_close(there.matrix, here.matrix, rtol=0, atol=1e-5)


def test_a_worker_with_another_revision_is_refused(cluster: None, tmp_path: Path) -> None:
    older = Seen("text", 384, "starter:text@older")
    with pytest.raises(BridgekitError, match="the revision of starter:text differs") as caught:
        encode_items(older, ["dog"], folder=tmp_path, run=on_cluster("starter:text", older, workers=1))
    assert "same versions" in str(caught.value.remedy)


def test_a_worker_that_cannot_open_the_encoder_is_one_clear_message(cluster: None, tmp_path: Path) -> None:
    encoder = load_encoder("starter:text", "cpu")
    with pytest.raises(BridgekitError, match="no model") as caught:
        encode_items(encoder, ["dog"], folder=tmp_path, run=on_cluster("starter:nothing", encoder, workers=1))
    assert "a Ray worker" in caught.value.what
    assert "choose one of" in str(caught.value.remedy)


def test_latents_that_are_not_finite_fail_only_their_item_on_a_worker_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sick(LetterEncoder):
        def encode(self, batch: Sequence[Tensor]) -> Tensor:
            latents = super().encode(batch)
            latents[0, 3], latents[2, 0] = torch.nan, torch.inf
            return latents

    worker = encoding._Worker("toy:sick", "text", Sick.revision)
    monkeypatch.setattr(worker, "_open", Sick)
    rows = {
        "number": np.array([0]),
        "items": np.array([json.dumps(["ant", "bee", "cat", "dog"])]),
        "reduced": np.array([False]),
    }
    (encoded,) = [
        encoding._read(dict(zip(found, row, strict=True)))
        for found in [worker(rows)]
        for row in zip(*found.values(), strict=True)
    ]
    assert list(encoded.kept) == [1, 3]
    assert encoded.latents.isfinite().all()
    assert {position: "not finite" in reason for position, reason in encoded.reasons.items()} == {0: True, 2: True}
