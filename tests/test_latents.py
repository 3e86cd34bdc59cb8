"""Each item is encoded once; a bad item fails alone; a killed run resumes."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bridgekit.encoders import Item
from bridgekit.errors import BridgekitError, PluginError
from bridgekit.latents import encode, store
from bridgekit.latents.batches import BATCH_SIZE
from bridgekit.latents.encode import encode_items
from bridgekit.latents.store import LatentStore
from tests.conftest import tone
from tests.shared import Fork
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


def test_an_item_is_identified_by_its_content_and_not_its_name(tmp_path: Path) -> None:
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
    assert resumed.encoded == 100 - 2 * BATCH_SIZE
    undisturbed: list[list[str]] = seen[3:]
    assert interrupted[2] == undisturbed[0]
    fresh = encode_items(Watched(), items, folder=tmp_path / "elsewhere")
    assert seen[-4:] == interrupted[:2] + undisturbed
    assert torch.equal(fresh.matrix, resumed.matrix)


def test_a_run_that_is_killed_loses_no_more_than_what_waits_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(ToneEncoder):
        def encode(self, batch: Sequence[torch.Tensor]) -> torch.Tensor:
            if len(self.encoded) == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().encode(batch)

    items = clips(tmp_path, 7 * BATCH_SIZE)
    with monkeypatch.context() as patch:
        patch.setattr(encode, "FLUSH_ROWS", 2 * BATCH_SIZE)
        patch.setattr(encode, "FLUSH_SECONDS", 3600)
        assert Fork(lambda: encode_items(Killed(), items), tmp_path / "log").wait() == -signal.SIGKILL
    # Written in twos: four of the five batches that were encoded before the kill.
    assert encode_items(ToneEncoder(), items).encoded == 3 * BATCH_SIZE


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each shard, as they are written."""
    rows: list[int] = []
    write = LatentStore.write

    def watched(store: LatentStore, digests: Sequence[bytes], *rest: torch.Tensor) -> None:
        rows.append(len(digests))
        write(store, digests, *rest)

    monkeypatch.setattr(LatentStore, "write", watched)
    return rows


@pytest.mark.parametrize(("seconds", "rows", "expected"), [(3600, 9999, [160]), (0, 9999, [32] * 5), (3600, 64, [64, 64, 32])])
def test_batches_are_collected_and_written_by_time_and_by_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: list[int], seconds: float, rows: int, expected: list[int]
) -> None:
    monkeypatch.setattr(encode, "FLUSH_SECONDS", seconds)
    monkeypatch.setattr(encode, "FLUSH_ROWS", rows)
    encode_items(ToneEncoder(), clips(tmp_path, 160))
    assert writes == expected


def test_a_long_run_does_not_pile_up_small_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "FLUSH_SECONDS", 0)
    monkeypatch.setattr(encode, "MANY_DURING", 3)
    counts: list[int] = []
    folder = LatentStore("toy:tone@1", 64).folder
    first = encode_items(
        ToneEncoder(),
        clips(tmp_path, 320),
        report=lambda _, done, total: counts.append(len(list(folder.glob("*.safetensors")))),
    )
    assert len(counts) == 1 + 320 // BATCH_SIZE
    assert max(counts) == 2
    second = encode_items(ToneEncoder(), clips(tmp_path, 320))
    assert second.encoded == 0
    assert torch.equal(first.matrix, second.matrix)


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


def test_a_store_whose_shards_another_process_merges_can_still_be_read() -> None:
    encoder = LetterEncoder()
    for number in range(8):
        LatentStore("toy:letters@1", 48).write([bytes([number] * 32)], torch.full((1, 48), float(number)))
    here, there = LatentStore("toy:letters@1", 48), LatentStore("toy:letters@1", 48)
    there.merge_small_shards()
    assert len(list(here.folder.iterdir())) == 1
    assert here.read([bytes([number] * 32) for number in range(8)])[:, 0].tolist() == list(range(8))
    for path in here.folder.iterdir():
        path.unlink()
    with pytest.raises(BridgekitError, match="disappeared"):
        here.read([bytes([3] * 32)])
    assert encode_items(encoder, ["dog"]).encoded == 1


def test_latents_that_would_fill_the_memory_are_mapped_from_an_unlinked_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    items: list[Item | None] = [f"text number {k}" for k in range(300)]
    inside = encode_items(LetterEncoder(), items)
    size = inside.matrix.numel() * 4
    monkeypatch.setattr(store, "free_memory", lambda: 2 * size - 1)
    mapped = encode_items(LetterEncoder(), items)
    assert torch.equal(mapped.matrix, inside.matrix)
    assert mapped.matrix.is_contiguous()
    assert len(list(mapped.folder.iterdir())) == 1
    assert is_mapped(mapped.matrix)
    monkeypatch.setattr(store, "free_memory", lambda: 2 * size)
    assert not is_mapped(encode_items(LetterEncoder(), items).matrix)


def is_mapped(matrix: torch.Tensor) -> bool:
    """Whether a matrix is in an unlinked file, according to the system."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in maps if "(deleted)" in line]
    return any(int(start, 16) <= matrix.data_ptr() < int(stop, 16) for start, stop in spans)


def test_latents_that_fit_neither_in_memory_nor_on_disk_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    encode_items(LetterEncoder(), ["dog"])

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store, "free_memory", lambda: 0)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(BridgekitError, match="fit neither in memory nor on disk") as caught:
        encode_items(LetterEncoder(), ["dog"])
    assert "No space left" in caught.value.what
    assert len(list(LatentStore("toy:letters@1", 48).folder.iterdir())) == 1


def test_latents_in_half_precision_take_half_of_the_memory_and_are_stored_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[Item | None] = [f"text number {number}" for number in range(40)]
    whole = encode_items(LetterEncoder(), texts).matrix
    half = encode_items(LetterEncoder(), texts, half=True)
    assert (half.encoded, half.matrix.dtype) == (0, torch.float16)
    assert half.matrix.nbytes == whole.nbytes // 2
    assert torch.equal(half.matrix, whole.half())
    assert torch.equal(encode_items(LetterEncoder(), texts).matrix, whole)
    monkeypatch.setattr(store, "free_memory", lambda: 0)  # in a memory-mapped file
    assert torch.equal(encode_items(LetterEncoder(), texts, half=True).matrix, whole.half())


def test_latents_beyond_half_precision_are_refused_with_a_remedy() -> None:
    class Large(LetterEncoder):
        def encode(self, batch: Sequence[torch.Tensor]) -> torch.Tensor:
            return super().encode(batch) + 70_000

    assert encode_items(Large(), ["dog"]).matrix.max() >= 70_000
    with pytest.raises(BridgekitError, match="latents are too large for half precision") as caught:
        encode_items(Large(), ["dog"], half=True)
    assert "omit --half" in str(caught.value.remedy)


def test_free_memory_is_what_the_system_reports() -> None:
    assert 1 << 20 < store.free_memory() < 1 << 50


def test_progress_counts_what_has_to_be_encoded() -> None:
    calls: list[tuple[int, int]] = []
    encode_items(LetterEncoder(), ["a", "b"], report=lambda _, done, total: calls.append((done, total)))
    encode_items(LetterEncoder(), ["a", "b", "c"], report=lambda _, done, total: calls.append((done, total)))
    assert calls == [(0, 2), (2, 2), (0, 1), (1, 1)]
