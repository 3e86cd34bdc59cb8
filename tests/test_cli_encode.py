"""`bridgekit encode`: a table's items are encoded into the latent store, and the counts are right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bridgekit.recipes.align import AlignOptions, run_alignment
from tests.test_align import QUICK
from tests.toys import NAMES, LetterEncoder, ToneEncoder, tone_table

pytestmark = pytest.mark.usefixtures("toy")


def test_encode_reports_what_it_encoded_and_align_reuses_it(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tone_table(tmp_path)
    code, out, _ = run("encode", "--pairs", str(table))
    assert code == 0
    assert f"audio: {6 * len(NAMES)} distinct items by toy:tone, {6 * len(NAMES)} encoded now" in out
    assert f"text: {len(NAMES)} distinct items" in out
    assert "items/s, in float32" in out, "so few are not worth a check"
    code, out, _ = run("encode", "--pairs", str(table), "--json")
    told = json.loads(out)
    assert told["rows"] == 6 * len(NAMES)
    assert {side["encoded_now"] for side in told["sides"].values()} == {0}
    assert Path(told["sides"]["audio"]["folder"]).is_dir()

    def again(*arguments: object) -> None:
        raise AssertionError("what is encoded is not encoded again")

    monkeypatch.setattr(ToneEncoder, "encode", again)
    monkeypatch.setattr(LetterEncoder, "encode", again)
    assert not run_alignment(AlignOptions(pairs=table, out=tmp_path / "bridge", preset=QUICK, progress=False)).reused


def test_bad_rows_are_reported_and_strict_refuses_them(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    table = tone_table(tmp_path)
    (tmp_path / "clips" / "ant 0.wav").write_text("no audio")
    code, _, err = run("encode", "--pairs", str(table))
    assert code == 0
    assert "1 row was set aside" in err
    assert "row 2, audio" in err
    code, _, err = run("encode", "--pairs", str(table), "--strict")
    assert code == 2
    assert "ant 0.wav" in err


def test_without_the_plugin_for_ray_the_message_says_what_to_install(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, err = run("encode", "--pairs", str(tone_table(tmp_path)), "--ray")
    assert (code, err.splitlines()[1]) == (2, "  fix: in bridgekit's own folder: pip install plugins/bridgekit-ray")
