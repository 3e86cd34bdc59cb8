"""Each item is encoded once, ever; a bad item fails alone; a killed run goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bridgekit import latents
from bridgekit.encoders import Item
from bridgekit.errors import PluginError
from bridgekit.latents import LatentStore, encode_items
from tests.conftest import tone
from tests.toys import LetterEncoder, ToneEncoder


def clips(folder: Path, n: int = 70) -> list[Item | None]:
    return [tone(folder / f"{k}.wav", 100 + 40 * k, 0.1 + 0.01 * (k % 7)) for k in range(n)]


def test_an_item_is_encoded_once_ever(tmp_path: Path) -> None:
    items = clips(tmp_path)
    first = encode_items(ToneEncoder(), items)
    again = ToneEncoder()
    second = encode_items(again, [*reversed(items), items[3]])
    assert first.encoded == 70
    assert again.encoded == []
    assert second.encoded == 0
    assert torch.equal(second.matrix[second.ids[:70]], first.matrix[first.ids].flip(0))
    assert second.ids[70] == second.ids[70 - 1 - 3]


def test_content_counts_and_not_the_name(tmp_path: Path) -> None:
    one, other = tone(tmp_path / "a.wav", 300), tone(tmp_path / "b" / "c.wav", 300)
    encoder = ToneEncoder()
    result = encode_items(encoder, [one, other])
    assert encoder.encoded == [1]
    assert result.ids.tolist() == [0, 0]
    tone(one, 999)
    assert encode_items(encoder, [one]).encoded == 1


def test_another_revision_has_its_own_latents() -> None:
    assert encode_items(LetterEncoder(), ["dog"]).encoded == 1
    assert encode_items(LetterEncoder(revision="toy:letters@2"), ["dog"]).encoded == 1
    assert encode_items(LetterEncoder(), ["dog"]).encoded == 0


def test_a_bad_item_fails_alone(tmp_path: Path) -> None:
    items = clips(tmp_path, 5)
    (tmp_path / "no.wav").write_text("this is not audio")
    items[2] = tmp_path / "no.wav"
    items[4] = tmp_path / "absent.wav"
    result = encode_items(ToneEncoder(), [*items, None])
    assert sorted(result.failed) == [2, 4]
    assert (result.ids >= 0).tolist() == [True, True, False, True, False, False]
    assert len(result.matrix) == 3


def test_latents_that_are_not_finite_fail_alone_and_are_not_kept() -> None:
    class Bad(LetterEncoder):
        def encode(self, batch: Sequence[torch.Tensor]) -> torch.Tensor:
            out = super().encode(batch)
            out[1, 0] = torch.nan
            return out

    result = encode_items(Bad(), ["one", "two", "three"])
    assert len(result.failed) == 1
    assert "finite" in next(iter(result.failed.values()))
    assert len(result.matrix) == 2
    assert encode_items(LetterEncoder(), ["one", "two", "three"]).encoded == 1


@pytest.mark.parametrize("shape", [(3, 47), (2, 48), (3,)])
def test_an_encoder_that_returns_the_wrong_shape_is_named(shape: tuple[int, ...]) -> None:
    class Wrong(LetterEncoder):
        def encode(self, batch: Sequence[torch.Tensor]) -> torch.Tensor:
            return torch.zeros(shape)

    with pytest.raises(PluginError, match="toy:letters"):
        encode_items(Wrong(), ["one", "two", "three"])


def test_a_run_that_is_stopped_loses_one_batch_and_the_next_meets_the_same_batches(tmp_path: Path) -> None:
    items = clips(tmp_path, 100)
    seen: list[list[str]] = []

    class Watched(ToneEncoder):
        def prepare(self, item: Item) -> torch.Tensor:
            value = super().prepare(item)
            value.path = str(item)
            return value

        def encode(self, batch: Sequence[torch.Tensor]) -> torch.Tensor:
            seen.append([value.path for value in batch])
            if len(seen) == 3:
                raise KeyboardInterrupt
            return super().encode(batch)

    with pytest.raises(KeyboardInterrupt):
        encode_items(Watched(), items)
    interrupted, seen[:] = list(seen), [[], [], []]
    resumed = encode_items(Watched(), items)
    assert resumed.encoded == 100 - 2 * latents.BATCH_SIZE
    undisturbed: list[list[str]] = seen[3:]
    assert interrupted[2] == undisturbed[0]
    fresh = encode_items(Watched(), items, folder=tmp_path / "elsewhere")
    assert seen[-4:] == interrupted[:2] + undisturbed
    assert torch.equal(fresh.matrix, resumed.matrix)


def test_batches_are_ordered_by_length(tmp_path: Path) -> None:
    items: list[Item | None] = [tone(tmp_path / f"{k}.wav", 200 + k, seconds=1.0 if k % 2 else 0.1) for k in range(64)]
    lengths: list[set[float]] = []

    class Watched(ToneEncoder):
        def prepare(self, item: Item) -> torch.Tensor:
            value = super().prepare(item)
            value.bytes = Path(item).stat().st_size
            return value

        def encode(self, batch: Sequence[torch.Tensor]) -> torch.Tensor:
            lengths.append({value.bytes for value in batch})
            return super().encode(batch)

    encode_items(Watched(), items)
    assert [len(sizes) for sizes in lengths] == [1, 1]


def test_a_damaged_shard_is_not_served_but_encoded_again(tmp_path: Path) -> None:
    items = clips(tmp_path, 4)
    expected = encode_items(ToneEncoder(), items)
    (shard,) = LatentStore("toy:tone@1", 64).folder.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-100])
    again = encode_items(ToneEncoder(), items)
    assert again.encoded == 4
    assert torch.equal(again.matrix, expected.matrix)


def test_small_shards_are_merged_and_nothing_is_lost(tmp_path: Path) -> None:
    items: list[Item | None] = [f"text number {k}" for k in range(400)]
    first = encode_items(LetterEncoder(), items)
    assert len(list(LatentStore("toy:letters@1", 48).folder.iterdir())) == 1
    second = encode_items(LetterEncoder(), items)
    assert second.encoded == 0
    assert torch.equal(first.matrix, second.matrix)


def test_progress_counts_what_has_to_be_encoded() -> None:
    calls: list[tuple[int, int]] = []
    encode_items(LetterEncoder(), ["a", "b"], progress=lambda done, total: calls.append((done, total)))
    encode_items(LetterEncoder(), ["a", "b", "c"], progress=lambda done, total: calls.append((done, total)))
    assert calls == [(0, 2), (2, 2), (0, 1), (1, 1)]
