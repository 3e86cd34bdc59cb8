"""Long runs leak no memory, files or threads: with few items and steps here, at full length in `make torture`."""

from __future__ import annotations

import mmap
import threading
from pathlib import Path

import pytest
from PIL import Image

from tests.torture import long_runs
from tests.torture.long_runs import ALLOWED_MIB, Sample, Watch, draw, faults, growth, run, short_texts, watch_steps

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc here that tells of memory")


def test_encoding_and_training_do_not_leak() -> None:
    outcome = run(2_000, 300, kinds=("texts", "steps"))
    assert not outcome.failures
    assert outcome.held == outcome.tried == 6
    assert set(outcome.figures) == {"2,000 texts", "300 steps"}


def test_a_leak_of_adapters_is_caught() -> None:
    kept: list[object] = []

    def keep(adapters: object) -> None:
        # A MiB at each of fifty validations, mapped anew: what earlier tests have freed would hide it.
        page = mmap.mmap(-1, 1 << 20)
        page.write(b"x" * (1 << 20))
        kept.append(page)

    samples = watch_steps(150, keep)
    assert growth(samples)[1] > ALLOWED_MIB
    assert ["memory grew" in fault for fault in faults("steps", samples)] == [True]


def test_a_leak_of_files_or_threads_is_caught(tmp_path: Path) -> None:
    stop = threading.Event()
    watch = Watch(50)
    files, workers = [], []
    for done in range(50):
        files.append((tmp_path / str(done)).open("w"))
        workers.append(threading.Thread(target=stop.wait))
        workers[-1].start()
        watch(done)
    stop.set()
    for file, worker in zip(files, workers, strict=True):
        file.close()
        worker.join()
    assert [fault.split(" grew")[0] for fault in faults("files", watch.samples)] == ["files: descriptors", "files: threads"]


def test_the_line_is_fitted_to_what_comes_after_the_warm_up() -> None:
    samples = [Sample(done, 100.0 + (50 if done >= 1_000 else 0) + done / 10_000, 5, 2) for done in range(0, 10_000, 200)]
    rate, total = growth(samples)
    assert rate == pytest.approx(1.0)
    assert total == pytest.approx(0.78)


def test_the_texts_are_different_and_as_many_as_asked_for() -> None:
    texts = short_texts(100_000)
    assert len(set(texts)) == 100_000
    assert {len(text) for text in texts} == {35}


def test_a_run_is_plotted(tmp_path: Path) -> None:
    samples = [Sample(done, 300.0, 5, 2) for done in range(0, 1_000, 20)]
    draw({"texts": samples, "steps": samples}, tmp_path / "runs.png")
    assert Image.open(tmp_path / "runs.png").size[0] > 600


def test_a_run_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="ended with 1"):
        long_runs.in_its_own_process("steps", 0)
