"""`compare`: the better encoder wins, the printed command trains it, and concatenations have a name that `align` takes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from bridgekit import BridgekitError, Pairs, compare, load_encoder, plugins
from bridgekit.bridge.trust import refuse_untrusted_encoder
from bridgekit.encoders import Encoder, Item
from bridgekit.evaluation.methods import probe
from bridgekit.evaluation.recall import mean_recall
from bridgekit.fusion.training import PRESETS
from bridgekit.hookspecs import EncoderProvider, hookimpl
from bridgekit.latents.encode import encode_items
from bridgekit.latents.encoded import encode_pairs
from bridgekit.progress import silent
from bridgekit.tables.splits import split_pairs
from tests.conftest import Run
from tests.toys import LetterEncoder, ToneEncoder, install, tone_table


@dataclass
class LoudnessEncoder(ToneEncoder):
    """A worse encoder of clips: of the spectrum, only what is left of it in 3 bands."""

    dim: int = 3
    revision: str = "toy:loudness@1"

    def prepare(self, item: Item) -> Tensor:
        return super().prepare(item)[:63].view(3, 21).mean(1)


@dataclass
class HalfEncoder(ToneEncoder):
    """The loudest band of the spectrum, if it is below 1 kHz, or above."""

    dim: int = 8
    revision: str = "toy:half@1"
    upper: bool = False

    def prepare(self, item: Item) -> Tensor:
        bands = super().prepare(item)[:40]
        loudest = bands * (bands == bands.max())
        return loudest[8:].view(8, 4).sum(1) if self.upper else loudest[:8]


@dataclass
class LengthEncoder(LetterEncoder):
    """A worse encoder of texts: their length, and whether they begin before m."""

    dim: int = 2
    revision: str = "toy:length@1"

    def prepare(self, item: Item) -> Tensor:
        return torch.tensor([float(len(str(item))), float(str(item) < "m")])


MODELS: dict[str, Callable[[], Encoder]] = {
    "tone": ToneEncoder,
    "loudness": LoudnessEncoder,
    "low": HalfEncoder,
    "high": lambda: HalfEncoder(revision="toy:half@2", upper=True),
    "letters": LetterEncoder,
    "length": LengthEncoder,
}


class Toys:
    """Encoders of different worth. A model's name may have an option, which changes nothing."""

    @hookimpl
    def encoder_providers(self) -> list[EncoderProvider]:
        defaults = {"audio": "tone", "text": "letters"}
        return [
            EncoderProvider(
                "toy", ("audio", "text"), lambda model, _: MODELS[model.split(",")[0]](), lambda: list(MODELS), defaults
            )
        ]


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> object:
    yield install(monkeypatch, Toys())
    plugins.forget_plugins()


def sides(a: Sequence[str], b: Sequence[str]) -> list[str]:
    return [word for option, names in (("--a", a), ("--b", b)) for name in names for word in (option, name)]


BOTH = sides(["toy:loudness", "audio"], ["text", "toy:length"])


def test_the_better_encoders_win_and_the_printed_command_reaches_the_printed_recall(run: Run, tmp_path: Path) -> None:
    tone_table(tmp_path)
    code, out, err = run("compare", *BOTH, "--pairs", "pairs.csv", "--json")
    assert code == 0, err
    found = json.loads(out)
    tried = {(row["a"], row["b"]): row for row in found["combinations"]}
    assert len(tried) == 3 * 3
    assert set(tried) >= {("toy:loudness", "toy:length"), ("concat:toy:loudness+toy:tone", "concat:toy:letters+toy:length")}
    assert tried["toy:tone", "toy:letters"]["probe"] > tried["toy:tone", "toy:length"]["probe"] + 0.1
    assert tried["toy:tone", "toy:letters"]["probe"] > tried["toy:loudness", "toy:letters"]["probe"] + 0.1
    best, second, third, *others = found["combinations"]
    assert "toy:tone" in best["a"]
    assert "toy:letters" in best["b"]
    assert all(row["fitted"] for row in (best, second, third))
    assert not any(row["fitted"] for row in others)
    assert best["fitted"]["validation"] >= second["fitted"]["validation"] >= third["fitted"]["validation"]
    assert others == sorted(others, key=lambda row: -row["probe"])
    assert all(row["interval"][0] <= row["probe"] <= row["interval"][1] for row in found["combinations"])
    assert found["rows"] == {"train": 96, "val": 12, "test": 12}

    command = shlex.split(found["command"])
    assert command[:2] == ["bridgekit", "align"]
    code, out, err = run(*command[1:], "--json")
    assert code == 0, err
    trained = json.loads(out)
    assert trained["provenance"]["method"] == best["fitted"]["method"]
    records = [each for each in trained["metrics"] if (each["method"], each["among"]) == (best["fitted"]["method"], "split")]
    assert mean_recall(records)[0] == pytest.approx(best["fitted"]["recall"], abs=1e-9)


def test_the_table_names_the_winner_first_and_says_what_its_figures_are(run: Run, tmp_path: Path) -> None:
    tone_table(tmp_path)
    code, out, _ = run("compare", *sides(["toy:loudness", "toy:tone"], ["text"]), "--pairs", "pairs.csv")
    assert code == 0
    head, *rows = [line.split() for line in out.splitlines()[1:6]]
    assert head[:2] == ["audio", "text"]
    best, worst = rows[1], rows[3]
    assert best[0] in ("2", "1+2"), "the tone encoder, perhaps with the other one"
    assert worst[:2] == ["1", "1"]
    assert worst[-1] == "3+48"
    assert "audio 1: toy:loudness" in out
    assert "audio 2: toy:tone" in out
    assert "text 1: toy:letters" in out
    assert "Rows: 96 train, 12 val, 12 test." in out
    assert out.splitlines()[-1].startswith("Next: bridgekit align --a ")


def test_a_concatenation_that_wins_is_trained_and_searched_by_its_name(run: Run, tmp_path: Path) -> None:
    """Each half of the spectrum hears half of the names."""
    tone_table(tmp_path)
    code, out, err = run("compare", *sides(["toy:low", "toy:high"], ["text"]), "--pairs", "pairs.csv", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["combinations"][0]["a"] == "concat:toy:low+toy:high"
    assert found["combinations"][0]["widths"] == [16, 48]
    assert run(*shlex.split(found["command"])[1:])[0] == 0
    code, out, err = run("search", "clips/owl 0.wav", "--bridge", "bridges/audio-text", "-k", "1", "--json")
    assert code == 0, err
    assert "owl" in out


def test_the_command_names_another_folder_where_a_bridge_lies_and_repeats_what_was_given(run: Run, tmp_path: Path) -> None:
    table = pd.read_csv(tone_table(tmp_path)).rename(columns={"audio": "my clip"})
    table.to_csv(tmp_path / "pairs.csv", index=False)
    (tmp_path / "bridges" / "audio-text").mkdir(parents=True)
    given = ("--pairs", "pairs.csv", "--column", "audio=my clip", "--seed", "3")
    code, out, err = run("compare", *sides(["audio", "toy:loudness"], ["text"]), *given)
    assert code == 0, err
    command = out.splitlines()[-1].removeprefix("Next: ")
    assert command.endswith("--pairs pairs.csv --column 'audio=my clip' --seed 3 --out bridges/audio-text-2")
    assert run(*shlex.split(command)[1:])[0] == 0


def test_a_table_in_memory_is_compared_in_python(tmp_path: Path) -> None:
    table = pd.read_csv(tone_table(tmp_path))
    table["audio"] = [str(tmp_path / path) for path in table["audio"]]
    found = compare(["audio", "toy:loudness"], ["text"], table, outside=True, progress=False)
    best = found.combinations[0]
    assert found.encoders == {"audio": ["toy:tone", "toy:loudness"], "text": ["toy:letters"]}
    assert found.command.startswith(f"bridgekit.align({best.a!r}, 'toy:letters', pairs, ")


def test_the_probe_never_sees_the_test_split(tmp_path: Path) -> None:
    """Other test items give the same figures, and other validation items do not."""
    pairs = read(tone_table(tmp_path))
    encoded = encode_pairs(pairs, {"audio": ToneEncoder(), "text": LetterEncoder()}, silent)
    split = np.asarray(split_pairs(pairs, 0, encoded.ids))

    def figures(changed: str) -> Any:
        ids = encoded.ids["audio"].copy()
        ids[split == changed] = np.roll(ids[split == changed], 1)
        moved = type(encoded)(encoded.pairs, encoded.latents, {**encoded.ids, "audio": ids}, encoded.keys)
        return probe(moved, split, PRESETS["default"], 0)

    assert figures("test") == figures("no split")
    assert figures("train") != figures("no split")


def read(table: Path) -> Pairs:
    from bridgekit import read_pairs

    return read_pairs(table, ["audio", "text"])


def test_the_recall_of_records_and_its_interval_are_those_of_their_queries() -> None:
    """Against a bootstrap over the queries themselves."""
    ranks = np.random.default_rng(0).geometric(0.15, size=200)
    record = {"queries": 200} | {f"recall@{k}": float((ranks <= k).mean()) for k in (1, 5, 10)}
    hits = np.mean([ranks <= k for k in (1, 5, 10)], axis=0)
    recall, (low, high) = mean_recall([record])
    assert recall == pytest.approx(hits.mean())
    samples = hits[np.random.default_rng(1).integers(200, size=(4_000, 200))].mean(1)
    assert (low, high) == pytest.approx(np.quantile(samples, (0.025, 0.975)), abs=0.01)
    narrower = mean_recall([record, record])[1]
    assert narrower[1] - narrower[0] < 0.85 * (high - low)  # two directions have twice the queries


def test_the_latents_of_a_concatenation_are_its_encoders_stored_ones(tmp_path: Path) -> None:
    clips = sorted((tone_table(tmp_path).parent / "clips").iterdir())[:4]
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"no sound")
    items = [clips[0], broken, None, *clips]
    parts = [encode_items(load_encoder(f"toy:{name}"), items) for name in ("loudness", "tone")]
    whole = encode_items(load_encoder("concat:toy:loudness+toy:tone"), items)
    assert whole.encoded == 0
    assert list(whole.failed) == [1]
    assert whole.ids.tolist() == parts[0].ids.tolist() == [0, -1, -1, 0, 1, 2, 3]
    torch.testing.assert_close(whole.matrix, torch.cat([part.matrix for part in parts], 1), rtol=0, atol=0)


def test_a_bridge_of_someone_else_opens_no_outside_path_within_a_concatenation(tmp_path: Path) -> None:
    inside = "concat:toy:tone+toy:loudness,file="
    refuse_untrusted_encoder(f"{inside}{tmp_path / 'bridge' / 'weights'}", tmp_path / "bridge")
    with pytest.raises(BridgekitError, match="an encoder on disk outside this folder"):
        refuse_untrusted_encoder(f"{inside}{tmp_path / 'weights'}", tmp_path / "bridge")
    with pytest.raises(BridgekitError, match="an encoder on disk outside this folder"):
        refuse_untrusted_encoder(f"concat:toy:{tmp_path / 'weights'}+toy:tone", tmp_path / "bridge")


def test_a_plus_within_a_name_separates_nothing() -> None:
    encoder = load_encoder("concat:toy:tone,layers=3+last+toy:loudness")
    assert encoder.revision == "toy:tone@1+toy:loudness@1"
    assert encoder.dim == 67
    with pytest.raises(BridgekitError, match="cannot be concatenated"):
        plugins.concatenated([("toy:tone,prompt=a+toy:b", ToneEncoder()), ("toy:loudness", LoudnessEncoder())])


@pytest.mark.parametrize(
    ("arguments", "message", "fix"),
    [
        (sides(["audio"], ["text"]), "nothing to compare", "bridgekit align"),
        (sides(["toy:tone", "toy:letters"], ["text"]), "different modalities: toy:tone is for audio, toy:letters", "--b"),
        (sides(["toy:tone", "toy:loudness"], ["toy:low"]), "two sides are audio", "--b"),
        (sides(["audio", "toy:tone"], ["text"]), "two encoders of --a are the same", "leave out one"),
        (sides(["audio", "tory:tone"], ["text"]), "no installed plugin provides 'tory'", "did you mean 'toy'?"),
        (
            sides(["audio", "concat:toy:low"], ["text"]),
            "a concatenation of only one encoder",
            "concat:PROVIDER:MODEL+PROVIDER:MODEL",
        ),
        (sides(["audio", "concat:toy:low+toy:letters"], ["text"]), "different modalities, audio and text", "of one modality"),
    ],
)
def test_mistakes_are_named_with_a_remedy(run: Run, tmp_path: Path, arguments: list[str], message: str, fix: str) -> None:
    tone_table(tmp_path, copies=1)
    code, _, err = run("compare", *arguments, "--pairs", "pairs.csv")
    assert code == 2
    assert message in err
    assert "  fix: " in err
    assert fix in err.split("  fix: ")[1]


def test_too_few_rows_are_refused(run: Run, tmp_path: Path) -> None:
    lines = tone_table(tmp_path, copies=1).read_text().splitlines()
    (tmp_path / "few.csv").write_text("\n".join(lines[:9]) + "\n")
    code, _, err = run("compare", *BOTH, "--pairs", "few.csv")
    assert code == 2
    assert "8 rows are too few to train on" in err
    assert "fix: add pairs" in err
