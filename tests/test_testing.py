"""`check_encoder` passes an encoder that keeps its contract, and names each rule that one breaks."""

from __future__ import annotations

import gc
import itertools
import mmap
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bridgekit import plugins, testing
from bridgekit.encoders import Encoder, Item
from bridgekit.errors import ItemError, PluginError
from bridgekit.hookspecs import EncoderProvider, hookimpl
from bridgekit.testing import check_encoder
from tests.conftest import tone
from tests.toys import LetterEncoder, ToneEncoder, ToyPlugin, install

TEXTS = ("an owl", "a much longer text about an owl that sits in a tree", "owls", "the moon, for a change")


@pytest.fixture(autouse=True, scope="module")
def frozen_heap() -> Iterator[None]:
    """Tensors are counted by walking the heap: that of all the tests before takes seconds a test."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    plugins.forget_plugins()


@pytest.fixture
def sounds(tmp_path: Path) -> list[Path]:
    """Clips of different pitch and length."""
    return [tone(tmp_path / f"{hertz}.wav", hertz, 0.1 + hertz / 1000) for hertz in (200, 330, 540)]


def broken_rules(
    monkeypatch: pytest.MonkeyPatch,
    opened: Callable[[], object] = LetterEncoder,
    items: Sequence[Item] = TEXTS,
    bad: Sequence[Item] = ("", "nul \0 byte"),
    **how: Any,
) -> list[str]:
    """What `check_encoder` says of an encoder, a sentence for each broken rule; none where it passes."""
    install(monkeypatch, offering(lambda model, device: opened()))
    return sentences("odd:x", items, bad, **how)


def offering(
    open: Callable[[str, str], object],
    modalities: tuple[str, ...] = ("text",),
    models: Callable[[], Any] = lambda: ["x"],
    **defaults: str,
) -> object:
    """A plugin with a provider `odd`."""

    class Plugin:
        @hookimpl
        def encoder_providers(self) -> list[EncoderProvider]:
            return [EncoderProvider("odd", modalities, open, models, defaults)]  # type: ignore[arg-type]

    return Plugin()


def sentences(name: str, items: Sequence[Item] = TEXTS, bad: Sequence[Item] = (), **how: Any) -> list[str]:
    try:
        check_encoder(name, items, bad, **how)
    except AssertionError as error:
        title, *broken = str(error).splitlines()
        assert name in title
        assert "encoder contract" in title
        assert all(sentence.startswith("- ") for sentence in broken)
        return broken
    return []


def test_encoders_that_keep_their_contract_pass(monkeypatch: pytest.MonkeyPatch, sounds: list[Path], tmp_path: Path) -> None:
    install(monkeypatch, ToyPlugin())
    noise = tmp_path / "noise.wav"
    noise.write_bytes(b"this is no sound")
    check_encoder("toy:tone", sounds, [noise, tmp_path / "missing.wav"])
    check_encoder("toy:letters", TEXTS, [""], changed="toy:tone")
    check_encoder("text", TEXTS)


def test_fewer_than_three_different_items_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ToyPlugin())
    with pytest.raises(ValueError, match="three different"):
        check_encoder("toy:letters", ["a", "b", "b", " a "])


# ---- the plugin


def test_a_missing_plugin_is_reported_with_the_problems_of_the_installed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ToyPlugin(), ImportError("no module named nothing"))
    first, second = sentences("even:x")
    assert "no installed plugin provides 'even'" in first
    assert "no module named nothing" in second


def test_a_problem_of_the_plugin_is_reported_even_if_the_encoder_works(monkeypatch: pytest.MonkeyPatch) -> None:
    class Half(ToyPlugin):
        @hookimpl
        def pair_sources(self) -> list[object]:
            return ["no source"]

    install(monkeypatch, Half())
    (broken,) = sentences("toy:letters")
    assert "PairSource" in broken


def test_a_model_that_does_not_open_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ToyPlugin())
    (broken,) = sentences("toy:absent")
    assert "cannot open toy:absent" in broken


def test_an_invalid_attribute_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    (broken,) = broken_rules(monkeypatch, lambda: LetterEncoder(dim=0))
    assert "`dim`" in broken
    (broken,) = broken_rules(monkeypatch, lambda: LetterEncoder(dim=0, revision=""))
    assert "without a valid `dim`, `revision`" in broken


def test_a_modality_that_the_provider_does_not_claim_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    (broken,) = broken_rules(monkeypatch, lambda: LetterEncoder(modality="smell"))
    assert "'smell' is not among its provider's modalities" in broken


def test_invalid_models_and_defaults_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> list[str]:
        raise RuntimeError("the hub is away")

    install(monkeypatch, offering(lambda model, device: LetterEncoder(), models=fails, audio="x"))
    models, default = sentences("odd:x")
    assert "the hub is away" in models
    assert "default for 'audio'" in default
    install(monkeypatch, offering(lambda model, device: LetterEncoder(), models=lambda: [1]))
    (broken,) = sentences("odd:x")
    assert "models() must return names" in broken


# ---- the revision


def test_a_revision_that_changes_on_every_opening_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = itertools.count()
    (broken,) = broken_rules(monkeypatch, lambda: LetterEncoder(revision=f"toy@{next(numbers)}"))
    assert "opened again as odd:x, its revision 'toy@0' is 'toy@1'" in broken


def test_a_model_that_opens_only_once_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    once = iter([LetterEncoder()])
    (broken,) = broken_rules(monkeypatch, lambda: next(once))
    assert "cannot be opened a second time" in broken


def test_other_weights_with_the_same_revision_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    (broken,) = broken_rules(monkeypatch, changed="odd:other")
    assert "'toy:letters@1' is also that of odd:other, which has other weights" in broken


def test_other_weights_that_do_not_open_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    (broken,) = broken_rules(monkeypatch, changed="absent:other")
    assert "absent:other, which has other weights, cannot be opened" in broken


# ---- what comes out


@dataclass
class Altered(LetterEncoder):
    """Letters, with something done to what `encode` gives."""

    alter: Callable[[Tensor], Any] = lambda latents: latents

    def encode(self, batch: Sequence[Tensor]) -> Tensor:
        altered: Tensor = self.alter(super().encode(batch))
        return altered


@pytest.mark.parametrize(
    ("alter", "rule"),
    [
        (lambda latents: latents[:, :-1], r"returned \(4, 47\) for 4 items; expected \(4, 48\)"),
        (lambda latents: latents[:-1], r"returned \(3, 48\) for 4 items; expected \(4, 48\)"),
        (lambda latents: latents.numpy(), "returned ndarray for 4 items"),
        (lambda latents: latents.double(), "must return float32, and returns float64"),
        (lambda latents: latents / 0, "not finite"),
        (lambda latents: latents * torch.ones(48, requires_grad=True), "keeps a gradient"),
        (lambda latents: torch.nn.functional.dropout(latents), "other vectors"),
        (lambda latents: torch.ones_like(latents), "all items, though different, have the same vector"),
        (lambda latents: latents[latents.norm(dim=1).argsort()], "does not keep the order of its batch"),
        (lambda latents: latents - latents.mean(0) / 9, "depends on its batch"),
        (lambda latents: latents / latents.norm(), "depends on its batch"),
        (lambda latents: 1 / 0, "failed to encode: ZeroDivisionError"),
    ],
)
def test_vectors_that_break_one_rule_are_reported_with_that_rule_alone(
    monkeypatch: pytest.MonkeyPatch, alter: Callable[[Tensor], Any], rule: str
) -> None:
    (broken,) = broken_rules(monkeypatch, lambda: Altered(alter=alter))
    assert re.search(rule, broken)


def test_order_is_checked_even_if_all_vectors_are_close_together(monkeypatch: pytest.MonkeyPatch) -> None:
    (broken,) = broken_rules(monkeypatch, lambda: Altered(alter=lambda latents: 1000 + latents.flip(0)))
    assert "does not keep the order" in broken


def test_all_broken_rules_are_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Poor(LetterEncoder):
        def prepare(self, item: Item) -> Tensor:
            return super().prepare(item or "nothing")

        def encode(self, batch: Sequence[Tensor]) -> Tensor:
            return super().encode(batch).half()

    broken = broken_rules(monkeypatch, lambda: Poor(modality="smell"), bad=[""], changed="odd:other")
    for rule, sentence in zip(("'smell'", "other weights", "bad item ''", "float16"), broken, strict=True):
        assert rule in sentence


@dataclass
class Faulty(LetterEncoder):
    """Breaks a rule in each of its lines."""

    current: Item = ""

    def prepare(self, item: Item) -> Tensor:
        if item == "bad":
            raise KeyError("lost")
        self.current = item
        time.sleep(0.001)
        return super().prepare(self.current)

    def encode(self, batch: Sequence[Tensor]) -> Tensor:
        latents = super().encode(batch)
        latents = latents - latents.mean(0) / 9
        owls = super().prepare("owls")
        latents[[one.equal(owls) for one in batch]] = torch.nan
        return latents[:, :-1]


def test_eight_faults_are_all_reported_in_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = itertools.count()
    opened = lambda model, device: Faulty(modality="smell", revision=f"toy@{next(numbers)}")  # noqa: E731
    install(monkeypatch, offering(opened, audio="x"))
    rules = (
        "its modality 'smell' is not among",
        "has a default for 'audio', which is not among its modalities",
        "its revision 'toy@0' is 'toy@1'",
        "ItemError for the bad item 'bad', and raises KeyError",
        "returned (4, 47) for 4 items; expected (4, 48)",
        "vectors that are not finite, for 'owls'",
        "depends on its batch",
        "prepare is not safe in threads",
    )
    for rule, sentence in zip(rules, sentences("odd:x", bad=["bad"]), strict=True):
        assert rule in sentence


def test_a_default_for_a_modality_that_its_model_does_not_have_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, offering(lambda model, device: LetterEncoder(), ("text", "audio"), audio="x"))
    (broken,) = sentences("odd:x")
    assert "its provider's default for 'audio', and its modality is 'text'" in broken


# ---- prepare


def test_a_refused_good_item_is_reported_and_the_others_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Picky(LetterEncoder):
        def prepare(self, item: Item) -> Tensor:
            if len(str(item)) > 40:
                raise ItemError("this is too long")
            return super().prepare(item).double()

    refused, other = broken_rules(monkeypatch, Picky)
    assert "refuses the good item 'a much longer text" in refused
    assert "this is too long" in refused
    assert "float64" in other


def test_an_accepted_bad_item_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    (broken,) = broken_rules(monkeypatch, bad=["", "a good text"])
    assert "ItemError for the bad item 'a good text', and takes it" in broken


@pytest.mark.parametrize("failure", [KeyError("lost"), PluginError("the plugin is to blame")])
def test_a_bad_item_that_raises_something_else_is_reported(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    class Rough(LetterEncoder):
        def prepare(self, item: Item) -> Tensor:
            if item == "bad":
                raise failure
            return super().prepare(item)

    (broken,) = broken_rules(monkeypatch, Rough, bad=["bad"])
    assert f"bad item 'bad', and raises {type(failure).__name__}" in broken


def test_a_bad_item_that_spoils_good_ones_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Spoiled(LetterEncoder):
        def encode(self, batch: Sequence[Tensor]) -> Tensor:
            latents = super().encode(batch)
            return latents / 0 if len(batch) == 5 else latents  # where a bad item was taken

        def prepare(self, item: Item) -> Tensor:
            return torch.zeros(48) if item == "bad" else super().prepare(item)

    takes, *spoils = broken_rules(monkeypatch, Spoiled, bad=["bad"])
    assert "takes it" in takes
    assert len(spoils) == 4
    assert "the good item 'an owl' fails in a table of good and bad items: its latents are not finite" in spoils[0]


def test_a_table_that_cannot_be_encoded_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Short(LetterEncoder):
        def prepare(self, item: Item) -> Tensor:
            return torch.zeros(3) if item == "bad" else super().prepare(item)

    takes, table = broken_rules(monkeypatch, Short, bad=["bad"])
    assert "takes it" in takes
    assert "a table of good and bad items cannot be encoded: PluginError" in table
    assert "stack expects each tensor to be equal size" in table


@dataclass
class Shared(LetterEncoder):
    """Keeps the item that it prepares where all threads see it."""

    current: Item = ""

    def prepare(self, item: Item) -> Tensor:
        self.current = item
        time.sleep(0.001)
        return super().prepare(self.current)


def test_a_prepare_that_is_not_thread_safe_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    (broken,) = broken_rules(monkeypatch, Shared, bad=[])
    assert "prepare is not safe in threads: several at once give another result" in broken


def test_a_prepare_that_fails_in_threads_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bound(LetterEncoder):
        def prepare(self, item: Item) -> Tensor:
            if threading.current_thread() is not threading.main_thread():
                raise RuntimeError("there is no event loop in this thread")
            return super().prepare(item)

    threads, *table = broken_rules(monkeypatch, Bound, bad=[])
    assert "not safe in threads" in threads
    assert "no event loop" in threads
    assert all("fails in a table" in sentence for sentence in table)


# ---- bytes without a file


def test_an_encoder_that_takes_paths_only_is_reported(monkeypatch: pytest.MonkeyPatch, sounds: list[Path]) -> None:
    class PathsOnly(ToneEncoder):
        def prepare(self, item: Item) -> Tensor:
            return super().prepare(Path(item))

    install(monkeypatch, offering(lambda model, device: PathsOnly(), ("audio",)))
    (broken,) = sentences("odd:x", sounds)
    assert "it fails on the bytes of 200.wav without a file: read items with bridgekit.media" in broken


def test_an_encoder_that_looks_at_a_files_name_is_reported(monkeypatch: pytest.MonkeyPatch, sounds: list[Path]) -> None:
    class Named(ToneEncoder):
        def prepare(self, item: Item) -> Tensor:
            return super().prepare(item) + isinstance(item, Path)

    install(monkeypatch, offering(lambda model, device: Named(), ("audio",)))
    (broken,) = sentences("odd:x", sounds)
    assert "the bytes of 200.wav without a file have another vector" in broken


# ---- devices and memory


def test_vectors_of_another_device_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    # A device that this machine need not have: what is checked is that it is opened and compared.
    monkeypatch.setattr(testing, "_other_devices", lambda device: ["cuda"])

    def opened(off: Callable[[Tensor], Any]) -> Callable[[str, str], Encoder]:
        return lambda model, device: Altered(alter=off if device == "cuda" else lambda latents: latents)

    install(monkeypatch, offering(opened(lambda latents: latents * 1.001)))
    assert sentences("odd:x") == []
    install(monkeypatch, offering(opened(lambda latents: latents.flip(1))))
    (broken,) = sentences("odd:x")
    assert "on the device 'cuda' are" in broken
    install(monkeypatch, offering(opened(lambda latents: latents[1:])))
    (broken,) = sentences("odd:x")
    assert re.search("does not work on the device 'cuda': .* expected", broken)


def test_the_devices_that_are_compared_are_those_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert testing._other_devices("cpu") == ["cuda"]
    assert testing._other_devices("cuda:0") == ["cpu"]


@dataclass
class Hoarder(LetterEncoder):
    """Keeps something of every batch."""

    keep: Callable[[Tensor], object] = lambda latents: None
    kept: list[object] = field(default_factory=list)

    def encode(self, batch: Sequence[Tensor]) -> Tensor:
        latents = super().encode(batch)
        self.kept.append(self.keep(latents))
        return latents


def test_leaked_tensors_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    (broken,) = broken_rules(monkeypatch, lambda: Hoarder(keep=lambda latents: latents))
    assert f"leave {2 * 2 * 48 * 4:,} more bytes of tensors alive" in broken


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system does not tell the resident memory")
def test_other_leaked_memory_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def mapped(latents: Tensor) -> mmap.mmap:
        memory = mmap.mmap(-1, 1 << 22)  # not from what earlier tests have freed
        memory.write(b"x" * (1 << 22))
        return memory

    (broken,) = broken_rules(monkeypatch, lambda: Hoarder(keep=mapped))
    assert "memory grows: every two batches take" in broken


def test_a_cache_that_fills_once_is_not_a_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Caches(LetterEncoder):
        """Keeps a large table from the fifth small batch on, while memory is watched."""

        small: int = 0
        table: Tensor | None = None

        def encode(self, batch: Sequence[Tensor]) -> Tensor:
            self.small += len(batch) == 2
            if self.small == 5:
                self.table = torch.ones(1 << 20)
            return super().encode(batch)

    assert broken_rules(monkeypatch, Caches) == []
