"""`bridgekit check`: the worst finding first, a remedy for each, and an exit code for scripts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.test_checking import add, copy
from tests.test_evaluation import with_splits
from tests.toys import tone_table

pytestmark = pytest.mark.usefixtures("toy")


def test_a_clean_table_is_reported_as_clean_with_the_next_command(run: Run, tmp_path: Path) -> None:
    tone_table(tmp_path)
    code, out, err = run("check", "pairs.csv")
    assert code == 0
    assert "120 usable rows, 0 set aside" in out
    assert "bridgekit align --pairs pairs.csv" in out
    assert "audio → text" in out
    assert "set aside:" not in err
    assert run("check", "pairs.csv", "--no-latents", "--strict")[0] == 0


def test_warnings_fail_only_where_strict_and_errors_always(run: Run, tmp_path: Path) -> None:
    table = with_splits(tone_table(tmp_path))
    add(table, "clips/absent.wav,owl,train")
    code, out, _ = run("check", table, "--no-latents")
    assert code == 0
    assert out.startswith("warning 1 of 121 rows are set aside: there is no such file")
    assert run("check", table, "--no-latents", "--strict")[0] == 1
    add(table, *(copy(table, f"owl {number}.wav", f"copy {number}.wav") + ",owl,test" for number in range(4)))
    code, out, _ = run("check", table, "--no-latents")
    assert code == 1
    assert out.startswith("error 4 validation or test rows also seen in training")
    assert "row 123 (test) = row 86 (train)" in out
    assert "... and 1 more" in out
    assert "fix: put both in the same split" in out
    assert "Fix the errors before training." in out


def test_json_has_all(run: Run, tmp_path: Path) -> None:
    table = with_splits(tone_table(tmp_path))
    add(table, *(copy(table, f"owl {number}.wav", f"copy {number}.wav") + ",owl,test" for number in range(4)))
    code, out, _ = run("check", table, "--json")
    told = json.loads(out)
    assert code == 1
    assert told["findings"][0]["kind"] == "leak"
    assert len(told["findings"][0]["items"]) == 4
    assert told["splits"]["test"]["rows"] == 24
    assert told["splits"]["test"]["chance"]["audio → text"]["1"] == pytest.approx(0.05)
    assert told["set_aside"] == []
    assert told["figures"]["audio"]["dimensions"] == 64


def test_bad_input_is_one_message_and_exit_code_2(run: Run, tmp_path: Path) -> None:
    code, out, err = run("check", "absent.csv")
    assert code == 2
    assert not out
    assert "no such table" in err
    tone_table(tmp_path)
    assert run("check", "pairs.csv", "--a", "toy:absent", "--b", "text")[0] == 2


def test_a_name_in_the_table_cannot_control_the_terminal(run: Run, tmp_path: Path) -> None:
    table = with_splits(tone_table(tmp_path))
    add(table, "clips/absent\x1b]0;title\x07[b].wav,owl,train")
    code, out, err = run("check", table, "--no-latents")
    assert code == 0
    assert "clips/absent\\x1b]0;title\\x07[b].wav" in out
    assert "\x1b" not in out + err
