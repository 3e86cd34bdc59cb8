"""What all tests share: no network, a cache of their own, and small real files."""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# On some Intel CPUs the last bits of MKL's products depend on where in memory their operands lie.
os.environ["MKL_CBWR"] = "AUTO,STRICT"

import numpy as np
import pytest
import soundfile

# A shell that runs this in the background has it ignore Ctrl-C, and all that it starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What has been imported by now stays: let no garbage collection walk through it again."""
    gc.collect()
    gc.freeze()


SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has an empty latent store of its own."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("BRIDGEKIT_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def esc10() -> Path:
    """The folder of the 400 field recordings, where they are."""
    folder = SHARED / "data" / "esc10"
    if not folder.is_dir():
        pytest.skip("the ESC-10 recordings lie beside the project in ../shared/data/esc10, and they are not here")
    return folder


@pytest.fixture(autouse=True)
def no_reports(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`align` renders no report and no image except where reports are tested: both take longer than training a toy bridge."""
    if not {"report", "docs"} & set(re.split(r"\W|_", request.node.nodeid)):
        monkeypatch.setattr("bridgekit.report.report_or_warning", lambda *arguments: {})
        monkeypatch.setattr("bridgekit.report.plots._png", lambda figure: b"not rendered")


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command line in an empty folder, in this process; gives exit code, standard output and standard error."""
    from bridgekit import PRESETS, cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS, "default", replace(PRESETS["default"], epochs=6, batch_size=32, shared_dim=16))
    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bridgekit", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return code, printed.out, printed.err

    return call


def tone(path: Path, hertz: float, seconds: float = 0.4, rate: int = 16_000) -> Path:
    """A real audio file with one tone in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(int(seconds * rate)) / rate
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * hertz * time), rate)
    return path


from tests.painting import picture_toys, workshop  # noqa: E402, F401  (fixtures for all)
from tests.spoken_words import spoken_words  # noqa: E402, F401  (a fixture for all)
from tests.toys import toy  # noqa: E402, F401  (a fixture for all)
