"""Batches are deterministic and group items of similar size; bfloat16 is used only where a check finds it accurate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from bridgekit.encoders import Item
from bridgekit.latents import batches
from bridgekit.latents.batches import AGREEMENT, BATCH_SIZE, CHECKED, MOST, SMALL, WORTH_CHECKING, agreement, plan_batches
from bridgekit.latents.encode import encode_items
from bridgekit.latents.store import LatentStore
from tests.toys import LetterEncoder

TEXTS: list[Item | None] = [f"{word} number {k}" for k in range(100) for word in ("kettle", "gate", "an iron bell")]


class LayerEncoder(LetterEncoder):
    """Letter trigrams through one layer of torch's, whose products autocast can run in bfloat16."""

    def __init__(self, common: float = 0.0) -> None:
        super().__init__(revision=f"toy:layer-{common}@1")
        self.model = nn.Linear(48, 48)
        torch.manual_seed(0)
        with torch.no_grad():
            self.model.weight.normal_()
            self.model.bias.fill_(common)
        self.passes: list[tuple[int, bool]] = []

    def encode(self, batch: Sequence[Tensor]) -> Tensor:
        reduced = torch.is_autocast_enabled("cpu")
        self.passes.append((len(batch), reduced))
        return self.model(torch.stack(list(batch))).float()


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that this machine multiplies bfloat16 faster."""
    monkeypatch.setenv("BRIDGEKIT_PRECISION", "bfloat16")


# ---- the plan


def test_short_texts_go_in_larger_batches_than_large_items() -> None:
    assert [len(batch) for batch in plan_batches(dict.fromkeys(range(600), 40))] == [MOST, MOST, 600 - 2 * MOST]
    assert [len(batch) for batch in plan_batches(dict.fromkeys(range(70), 100_000))] == [BATCH_SIZE, BATCH_SIZE, 6]
    assert [len(batch) for batch in plan_batches(dict.fromkeys(range(200), SMALL // 100))] == [100, 100]
    assert plan_batches({}) == []


def test_a_batch_of_many_ends_where_the_items_grow_and_none_is_left_out() -> None:
    sizes = {number: 2 + number // 8 for number in range(5_000)}
    planned = plan_batches(sizes)
    assert [number for batch in planned for number in batch] == list(sizes)
    for batch in planned:
        assert len(batch) <= BATCH_SIZE or (len(batch) <= MOST and len(batch) * sizes[batch[-1]] <= SMALL)
    lengths = [len(batch) for batch in planned[:-1]]
    assert lengths == sorted(lengths, reverse=True)
    assert (lengths[0], lengths[-1]) == (MOST, BATCH_SIZE)


# ---- the check


@pytest.mark.usefixtures("fast")
def test_many_items_run_in_bfloat16_where_a_check_finds_it_near_enough() -> None:
    encoder = LayerEncoder()
    result = encode_items(encoder, TEXTS)
    assert encoder.passes[:2] == [(CHECKED, False), (CHECKED, True)]
    assert all(reduced for _, reduced in encoder.passes[2:])
    assert result.precision.products == "bfloat16"
    assert result.precision.agreement is not None
    assert AGREEMENT <= result.precision.agreement < 1
    with torch.inference_mode():
        full = encoder.encode([encoder.prepare(str(text)) for text in TEXTS])
    found = result.matrix[result.ids]
    assert not torch.equal(found, full)
    assert agreement(full, found) >= AGREEMENT


@pytest.mark.usefixtures("fast")
def test_an_encoder_that_bfloat16_spoils_runs_in_float32_and_the_error_is_reported() -> None:
    encoder = LayerEncoder(common=500.0)
    result = encode_items(encoder, TEXTS)
    assert [reduced for _, reduced in encoder.passes] == [False, True, *[False] * (len(encoder.passes) - 2)]
    assert result.precision.products == "float32"
    assert result.precision.agreement is not None
    assert result.precision.agreement < AGREEMENT
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        spoiled = encoder.encode([encoder.prepare(str(text)) for text in TEXTS])
    # A large common offset hides the difference: it shows only around the mean.
    assert cosine_similarity(result.matrix[result.ids], spoiled).min() > AGREEMENT


@pytest.mark.usefixtures("fast")
def test_few_items_run_in_float32_and_pay_for_no_check() -> None:
    encoder = LayerEncoder()
    result = encode_items(encoder, TEXTS[: WORTH_CHECKING - 1])
    assert encoder.passes == [(WORTH_CHECKING - 1, False)]
    assert (result.precision.products, result.precision.agreement) == ("float32", None)


def test_the_environment_can_forbid_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRIDGEKIT_PRECISION", "float32")
    encoder = LayerEncoder()
    assert encode_items(encoder, TEXTS).precision.products == "float32"
    assert not any(reduced for _, reduced in encoder.passes)


def test_a_machine_that_is_no_faster_in_bfloat16_checks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "product_dtype", lambda device: torch.float32)
    encoder = LayerEncoder()
    assert encode_items(encoder, TEXTS).precision.agreement is None
    assert not any(reduced for _, reduced in encoder.passes)


class Clumsy(LayerEncoder):
    def encode(self, batch: Sequence[Tensor]) -> Tensor:
        return torch.from_numpy(self.model(super().encode(batch)).numpy())  # numpy has no bfloat16


class Overflowing(LayerEncoder):
    def encode(self, batch: Sequence[Tensor]) -> Tensor:
        found = super().encode(batch)
        return found / 0 if self.passes[-1][1] else found


class Elsewhere(LayerEncoder):
    def encode(self, batch: Sequence[Tensor]) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().encode(batch)


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("kind", [Clumsy, Overflowing, Elsewhere])
def test_an_encoder_that_fails_in_bfloat16_or_does_not_change_runs_in_float32(kind: type[LayerEncoder]) -> None:
    result = encode_items(kind(), TEXTS)
    assert (result.precision.products, result.precision.agreement) == ("float32", None)
    assert result.encoded == len(TEXTS)
    assert not result.failed


@pytest.mark.usefixtures("fast")
def test_a_stopped_run_resumes_in_its_precision_however_little_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopping(LayerEncoder):
        def encode(self, batch: Sequence[Tensor]) -> Tensor:
            if len(self.passes) == 3:  # the check's two passes, and the first batch
                raise KeyboardInterrupt
            return super().encode(batch)

    texts: list[Item | None] = [f"{word} number {k}" for k in range(140) for word in ("kettle", "an iron bell")]
    for folder in ("stopped", "forbidden"):
        with pytest.raises(KeyboardInterrupt):
            encode_items(Stopping(), texts, folder=tmp_path / folder)
    resumed = LayerEncoder()
    second = encode_items(resumed, texts, folder=tmp_path / "stopped")
    assert resumed.passes == [(len(texts) - MOST, True)]
    assert second.precision.products == "bfloat16"
    undisturbed = encode_items(LayerEncoder(), texts, folder=tmp_path / "undisturbed")
    assert torch.equal(second.matrix, undisturbed.matrix)
    later = LayerEncoder()
    assert encode_items(later, [*texts, "another"], folder=tmp_path / "stopped").precision.products == "float32"
    monkeypatch.setenv("BRIDGEKIT_PRECISION", "float32")
    assert encode_items(LayerEncoder(), texts, folder=tmp_path / "forbidden").precision.products == "float32"


@pytest.mark.usefixtures("fast")
def test_shards_record_their_precision_and_are_not_mixed() -> None:
    encoder = LayerEncoder()
    found = encode_items(encoder, TEXTS).precision
    for number in range(10):
        encode_items(encoder, [f"one more text, {number}"])
    store = LatentStore(encoder.revision, encoder.dim)
    kinds = sorted(
        (len(shard.digests), shard.precision.products, shard.precision.agreement) for shard in store._shards.values()
    )
    assert (len(TEXTS), "bfloat16", found.agreement) in kinds
    assert sum(rows for rows, products, _ in kinds if products == "float32") == 10
    assert len(kinds) < 10
    assert not list(store.folder.glob("*.json"))


def test_the_check_spreads_over_all_sizes() -> None:
    seen: list[Item] = []

    class Watched(LayerEncoder):
        def prepare(self, item: Item) -> Tensor:
            seen.append(item)
            return super().prepare(item)

    def run(given: Sequence[batches.Batch]) -> object:
        return batches.encode_batches(Watched(), given)

    texts = ["a" * (1 + number) for number in range(320)]
    batches.check_precision(run, texts)  # type: ignore[arg-type]
    assert sorted({len(str(item)) for item in seen}) == list(range(1, 321, 10))
