"""The command line as a new user sees it: help, output for people and programs, one message for each mistake."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from safetensors.numpy import load_file

from bridgekit import PRESETS, Bridge, Preset, align
from bridgekit.bridge.bridge import Side
from bridgekit.cli import common
from bridgekit.fusion.adapter import FusionAdapter
from bridgekit.progress import progress_bars
from tests.conftest import Run
from tests.toys import tone_table

pytestmark = pytest.mark.usefixtures("toy")


def test_import_does_not_import_torch_and_neither_does_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    script = "\n".join(
        [
            "import os, sys, bridgekit, bridgekit.cli",
            "sys.argv = ['bridgekit', '--help']",
            "try:",
            "    bridgekit.cli.main()",
            "except SystemExit:",
            "    print(sorted(sys.modules))",
            "    print('threads wait', os.environ['OMP_WAIT_POLICY'])",
        ]
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    for heavy in ("torch", "numpy", "transformers", "timm", "sklearn", "matplotlib", "pyarrow"):
        assert f"'{heavy}'" not in loaded
    assert "threads wait passive" in loaded  # has to be set before torch loads OpenMP


def test_a_terminal_shows_at_once_that_pytorch_is_being_loaded(tmp_path: Path) -> None:
    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "bridgekit", "info", "nowhere"]
    process = subprocess.Popen(command, stdin=end, stdout=end, stderr=end, cwd=tmp_path, env=os.environ | {"TERM": "xterm"})
    os.close(end)
    shown = b""
    while b"nowhere" not in shown:
        shown += os.read(terminal, 4096)
    process.wait()
    os.close(terminal)
    assert b"loading PyTorch" in shown


@pytest.mark.parametrize("verb", ["check", "compare", "align", "bind", "eval", "embed", "search", "info", "plugins"])
def test_every_verb_has_help_with_an_example(run: Run, verb: str) -> None:
    code, out, _ = run(verb, "--help")
    assert code == 0
    assert f"Example: bridgekit {verb}" in " ".join(out.split())
    assert "--json" in out


def test_help_ends_with_a_command_for_ones_own_table(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert out.strip().splitlines()[-1].strip() == "bridgekit align --pairs clips.csv"


def test_align_then_search_then_info_then_eval_then_embed(run: Run, tmp_path: Path) -> None:
    tone_table(tmp_path)
    code, out, _ = run("align", "--a", "audio", "--b", "text", "--pairs", "pairs.csv")
    assert code == 0
    assert "FuseMix" in out
    assert "random" in out
    assert "closed form" in out
    assert "ridge" in out
    assert "bridges/audio-text" in out
    assert "bridgekit search" in out
    code, out, _ = run("search", "clips/owl 0.wav", "-k", 2, "--json")
    assert code == 0
    (answer,) = json.loads(out)
    assert answer["query"] == "clips/owl 0.wav"
    assert len(answer["found"]) == 2
    assert run("search", "owl")[0] == 0
    code, out, _ = run("info", "--json")
    assert json.loads(out)["provenance"]["pairs"] == "pairs.csv"
    assert "toy:tone" in run("info")[1]
    code, out, _ = run("eval", "--json")
    assert {record["split"] for record in json.loads(out)["metrics"]} == {"test"}
    assert "test" in run("eval")[1]
    code, out, _ = run("eval", "--zero-shot", "--json", "--pairs", "pairs.csv", "--unseen")
    assert json.loads(out)["items"] == 12
    code, out, _ = run("embed", "clips/owl 0.wav", "clips/ant 1.wav", "--out", "two.safetensors")
    assert code == 0
    assert load_file("two.safetensors")["embeddings"].shape == (2, 16)
    run("embed", "an owl", "--out", "one.npy")
    assert np.load("one.npy").shape == (1, 16)


def test_search_shows_words_files_folders_and_lines(run: Run, tmp_path: Path) -> None:
    tone_table(tmp_path)
    run("align", "--pairs", "pairs.csv")
    (tmp_path / "words.txt").write_text("owl\ncat\n\nowl\n")
    assert run("search", "clips/owl 0.wav", "--among", "words.txt")[1].count("\n") == 3
    assert ".wav" in run("search", "owl", "--among", "clips", "-k", 1)[1]


def test_rows_set_aside_are_reported_and_counted(run: Run, tmp_path: Path) -> None:
    table = tone_table(tmp_path)
    with table.open("a") as file:
        file.writelines(f"clips/gone {k}.wav,owl\n" for k in range(14))
        file.write("clips/owl 0.wav,owl\n")
    code, _, err = run("align", "--pairs", "pairs.csv")
    assert code == 0
    assert "15 rows were set aside" in err
    assert "row 122, audio" in err
    assert "and 5 more" in err
    code, out, _ = run("align", "--pairs", "pairs.csv", "--json")
    assert len(json.loads(out)["set_aside"]) == 15
    code, _, err = run("align", "--pairs", "pairs.csv", "--strict", "--out", "other")
    assert code == 2
    assert "15 of 135 rows" in err


def huge_png(path: Path) -> None:
    """A 20,000 x 20,000 PNG of one bit a pixel, all white, 50 KB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (20_000).to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    pixels = zlib.compress((b"\0" + b"\xff" * 2_500) * 20_000, 1)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


def table_with(audio: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "pairs.csv").write_text("audio,text\n" + f"{audio},owl\n" * 1, encoding="utf-8")

    return write


def truncated_mp3(folder: Path) -> None:
    soundfile.write(folder / "cut.mp3", np.sin(np.arange(88_200) / 20), 44_100)
    whole = (folder / "cut.mp3").read_bytes()
    (folder / "cut.mp3").write_bytes(whole[: len(whole) // 2])
    table_with("cut.mp3")(folder)


MISTAKES: dict[str, tuple[Callable[[Path], object], list[str], list[str]]] = {
    "a missing table": (lambda folder: None, ["--pairs", "gone.csv"], ["no such table", "gone.csv"]),
    "an unknown source": (lambda folder: None, ["--pairs", "toy:words"], ["no pair source", "toy:words"]),
    "no pairs": (lambda folder: None, [], ["which pairs", "--pairs"]),
    "an unknown modality": (lambda folder: None, ["--a", "smell"], ["smell", "bridgekit plugins"]),
    "an unknown provider": (lambda folder: None, ["--a", "timm:resnet50"], ["timm", "pip install plugins/bridgekit-timm"]),
    "twice the same modality": (lambda folder: None, ["--a", "text", "--b", "text"], ["two sides are text"]),
    "an unknown preset": (lambda folder: None, ["--preset", "best"], ["best", "default, paper"]),
    "a frozen side that is none": (lambda folder: None, ["--freeze", "image"], ["image", "audio, text"]),
    "an unknown column": (
        lambda folder: (folder / "pairs.csv").write_text("noise,text\na.wav,owl\n"),
        ["--pairs", "pairs.csv"],
        ["no column `audio`", "`noise`, `text`", "--column audio=NAME"],
    ),
    "an empty table": (lambda folder: (folder / "pairs.csv").touch(), ["--pairs", "pairs.csv"], ["empty"]),
    "a header and no rows": (
        lambda folder: (folder / "pairs.csv").write_text("audio,text\n"),
        ["--pairs", "pairs.csv"],
        ["no rows"],
    ),
    "text that is not UTF-8": (
        lambda folder: (folder / "pairs.csv").write_bytes("audio,text\na.wav,Bär\n".encode("latin-1")),
        ["--pairs", "pairs.csv"],
        ["UTF-8", "row 2"],
    ),
    "a missing file": (table_with("gone.wav"), ["--pairs", "pairs.csv"], ["no such file", "gone.wav", "row 2"]),
    "an empty file": (
        lambda folder: ((folder / "a.wav").touch(), table_with("a.wav")(folder)),
        ["--pairs", "pairs.csv"],
        ["empty", "a.wav"],
    ),
    "text named .wav": (
        lambda folder: ((folder / "a.wav").write_text("hello"), table_with("a.wav")(folder)),
        ["--pairs", "pairs.csv"],
        ["row 2", "a.wav"],
    ),
    "a truncated mp3": (truncated_mp3, ["--pairs", "pairs.csv"], ["row 2", "cut.mp3"]),
    "a place that cannot be written": (
        tone_table,
        ["--pairs", "pairs.csv", "--out", "/proc/x"],
        ["cannot be written", "in: /proc"],
    ),
    "a folder without class folders": (lambda folder: (folder / "c").mkdir(), ["--pairs", "c"], ["the folder is empty"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_message_with_exit_code_2(run: Run, tmp_path: Path, mistake: str) -> None:
    prepare, arguments, expected = MISTAKES[mistake]
    prepare(tmp_path)
    code, _, err = run("align", *arguments)
    assert code == 2
    message = [line for line in err.splitlines() if line.strip()]
    assert message[0].startswith("bridgekit: ")
    assert len(message) <= 3
    for part in expected:
        assert part in err
    assert not (tmp_path / "bridges").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["align", "--a", "audio", "--b", "text", "--pairs", "sounds.csv"],
        ["align", "--a", "toy:other", "--b", "audio", "--pairs", "sounds.csv"],
        ["encode", "--a", "audio", "--b", "text", "--pairs", "sounds.csv"],
        ["check", "sounds.csv", "--a", "toy:tone", "--b", "text"],
        ["bind", "bridges/texts", "--add", "audio", "--pairs", "sounds.csv"],
        ["eval", "bridges/texts", "--pairs", "sounds.csv"],
        ["eval", "bridges/texts", "--pairs", "sounds.csv", "--generate"],
    ],
    ids=lambda arguments: " ".join([arguments[0], *arguments[-1:]]),
)
def test_a_missing_column_is_told_before_any_encoder_is_opened(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    preset, modalities = PRESETS["default"], ("motion" if arguments[0] == "bind" else "audio", "text")
    sides = {modality: Side(f"toy:{modality}", "1", 4, False) for modality in modalities}
    adapters = {name: FusionAdapter(4, preset.shared_dim, preset.blocks, preset.expansion, preset.dropout) for name in sides}
    Bridge(sides, adapters, preset, 0.07).save(tmp_path / "bridges" / "texts")
    (tmp_path / "sounds.csv").write_text("noise,text\na.wav,owl\n")
    for module in ("bridge.bridge", "recipes.sides", "recipes.bind", "recipes.check", "recipes.judge"):
        monkeypatch.setattr(f"bridgekit.{module}.load_encoder", lambda *arguments: pytest.fail("an encoder was opened"))
    code, _, err = run(*arguments)
    assert (code, err.splitlines()[-3]) == (2, "bridgekit: the table has no column `audio`; its columns are `noise`, `text`")


def test_the_json_of_a_mistake_says_the_same(run: Run) -> None:
    code, out, _ = run("align", "--pairs", "gone.csv", "--json")
    assert code == 2
    assert json.loads(out)["error"]["where"] == "gone.csv"


@pytest.mark.parametrize("kind", ["1 x 1 pixels", "400,000,000 pixels"])
def test_a_picture_too_small_or_too_large_says_how_large_it_is(tmp_path: Path, kind: str) -> None:
    from bridgekit import ItemError
    from bridgekit.media import read_image

    path = tmp_path / "picture.png"
    Image.new("RGB", (1, 1)).save(path) if kind == "1 x 1 pixels" else huge_png(path)
    with pytest.raises(ItemError) as caught:
        read_image(path)
    assert "picture.png" in str(caught.value)
    assert kind in str(caught.value)


def test_searching_for_a_file_that_is_not_there_or_without_a_bridge(run: Run, tmp_path: Path) -> None:
    code, _, err = run("search", "owl")
    assert code == 2
    assert "no bridge" in err
    tone_table(tmp_path)
    align(pairs="pairs.csv", progress=False)
    code, _, err = run("search", "clips/gone.wav")
    assert code == 2
    assert "no such file" in err
    assert run("embed", "owl", "--out", "vectors.docx")[0] == 2


def test_plugins_lists_what_each_provides(run: Run) -> None:
    assert "toy:tone  (default for audio)" in run("plugins")[1]
    (toy,) = json.loads(run("plugins", "--json")[1])
    assert toy["defaults"] == {"audio": "toy:tone", "text": "toy:letters"}


def test_debug_shows_the_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from bridgekit import BridgekitError

    with pytest.raises(BridgekitError):
        run("--debug", "align", "--pairs", "gone.csv")


def test_ctrl_c_says_that_nothing_is_lost(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bridgekit.recipes.align.run_alignment", interrupted)
    code, _, err = run("align")
    assert code == 130
    assert "Nothing is lost" in err


class _Interrupted:
    """Ctrl-C arrives while it is being deleted, where Python drops exceptions."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_in_a_destructor_ends_the_verb_at_its_next_report(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        with progress_bars() as report:
            _Interrupted()
            report("training", 0, 1)
        raise AssertionError("it went on")

    monkeypatch.setattr("bridgekit.recipes.align.run_alignment", interrupted)
    code, _, err = run("align")
    assert (code, "Nothing is lost" in err) == (130, True)


def test_ctrl_c_that_a_library_replaces_by_its_own_error_is_still_ctrl_c(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape of object type") from None

    monkeypatch.setattr("bridgekit.recipes.align.run_alignment", interrupted)
    code, _, err = run("align")
    assert (code, "Nothing is lost" in err) == (143, True)


def test_a_run_that_diverges_gives_its_last_good_state_and_says_so(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tone_table(tmp_path)
    monkeypatch.setitem(PRESETS, "default", replace(PRESETS["default"], lr=300.0, warmup_steps=0))
    for again in (False, True):
        code, out, err = run("align", "--pairs", "pairs.csv", "--json")
        assert code == 0, err
        told = json.loads(out)
        assert told["reused"] is again
        epoch = told["provenance"]["diverged"]
        assert 1 <= told["provenance"]["best_epoch"] < epoch
        assert f"Training diverged in epoch {epoch}" in err
        assert "fix: check for extreme latents" in err
    tensors = load_file(tmp_path / "bridges" / "audio-text" / "adapters.safetensors")
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
    assert f"diverged: {epoch}" in (tmp_path / "bridges" / "audio-text" / "README.md").read_text()
    monkeypatch.setitem(PRESETS, "default", replace(PRESETS["default"], lr=1e12))
    code, out, err = run("align", "--pairs", "pairs.csv", "--out", "none")
    assert code == 2
    assert "training diverged: the loss is not finite in epoch 1" in err
    assert not (tmp_path / "none").exists()


def test_twelve_rows_print_no_recall_of_one_query_and_json_has_it(run: Run, tmp_path: Path) -> None:
    table = tone_table(tmp_path).read_text().splitlines()
    (tmp_path / "few.csv").write_text("\n".join(table[:1] + table[1::9][:12]))
    code, out, err = run("align", "--pairs", "few.csv", "--out", "few")
    assert code == 0, err
    assert "100.0" not in out
    assert "–100" in out
    assert "95 % confidence interval, for fewer than 30 queries (fewest: 1)." in out
    records = json.loads(run("info", "few", "--json")[1])["metrics"]
    assert {record["recall@1"] for record in records if record["queries"] == 1} <= {0.0, 1.0}


def test_a_recall_table_fits_80_columns_without_cutting_a_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    recalls = {"recall@1": 1.0, "recall@5": 1.0, "recall@10": 1.0, "median_rank": 1234.5}
    record = {"split": "[b]unseen[/b] speakers", "direction": "accelerometer → spectrogram", "candidates": 123456, **recalls}
    for queries in (5, 30):
        records = [{**record, "queries": queries, "method": name} for name in ("closed-form start", "FuseMix")]
        common.print_metrics(records, "Recall", Bridge({}, {}, Preset(), 0.07))
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert "…" not in "".join(lines)
    assert sum("57–100 57–100 57–100" in line for line in lines) == 2
    assert [line.split()[-4:] for line in lines if "100.0" in line] == [["100.0", "100.0", "100.0", "1234.5"]] * 2
    assert "[b]unseen[/" in "".join(lines)
