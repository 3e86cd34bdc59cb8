"""A file that crashes a decoder, hangs it or exhausts its memory fails alone, and decoders leave nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from bridgekit.decoding import isolation, tables
from bridgekit.decoding.isolation import decoder_ids
from bridgekit.errors import BridgekitError, ItemError
from bridgekit.media import read_audio, read_image
from bridgekit.tables import arrow
from bridgekit.tables.reading import read_pairs
from tests.conftest import tone
from tests.shared import PATIENCE, wait_until
from tests.torture import media

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")


@pytest.fixture(autouse=True)
def no_decoders() -> Iterator[None]:
    """Each test starts its own decoders, and leaves none."""
    isolation._pool.close()
    yield
    isolation._pool.close()


@pytest.fixture
def long_clip(tmp_path: Path) -> Path:
    """Four hours less a second, which take seconds to decode and no room on the disk."""
    path = tmp_path / "long.wav"
    soundfile.write(path, np.zeros(1), 44_100, subtype="PCM_U8")
    header, frames = path.read_bytes()[:44], (4 * 3600 - 1) * 44_100
    path.write_bytes(header[:4] + (36 + frames).to_bytes(4, "little") + header[8:40] + frames.to_bytes(4, "little"))
    os.truncate(path, 44 + frames)
    return path


def attacked(path: Path, number: signal.Signals) -> str:
    """The message about a file whose decoder is sent a signal while decoding it."""
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_audio, path, 16_000)
        wait_until(lambda: any(has_open(pid, path) for pid in decoder_ids()))
        (decoder,) = (pid for pid in decoder_ids() if has_open(pid, path))
        os.kill(decoder, number)
        with pytest.raises(ItemError) as caught:
            reading.result()
    assert is_gone(decoder)
    assert caught.value.where == str(path)
    assert caught.value.remedy
    return caught.value.what


def has_open(pid: int, path: Path) -> bool:
    with contextlib.suppress(OSError):
        return any(link.readlink() == path for link in Path(f"/proc/{pid}/fd").iterdir())
    return False


@on_linux
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGSEGV, "the decoder crashed on this file (SIGSEGV)"),
        (signal.SIGABRT, "the decoder crashed on this file (SIGABRT)"),
        (signal.SIGKILL, "the decoder was killed (SIGKILL), by someone or because memory ran out"),
    ],
)
def test_a_decoder_that_crashes_while_reading_a_file_fails_only_that_file(
    tmp_path: Path, long_clip: Path, number: signal.Signals, message: str
) -> None:
    good = tone(tmp_path / "good.flac", 440)
    stop = threading.Event()

    def read_on() -> int:
        count = 0
        while not stop.is_set():
            assert len(read_audio(good, 16_000)) == 6_400
            count += 1
        return count

    with ThreadPoolExecutor(1) as beside:
        reading = beside.submit(read_on)
        assert attacked(long_clip, number) == message
        stop.set()
        assert reading.result() > 0
    assert len(read_audio(good, 16_000)) == 6_400


@on_linux
def test_a_decoder_that_hangs_is_killed_and_fails_only_that_file(
    tmp_path: Path, long_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(isolation, "SECONDS", 5.0)
        patch.setattr(isolation, "SECONDS_PER_MB", 0.0)
        assert attacked(long_clip, signal.SIGSTOP) == "decoding it took over 5 seconds"
    assert len(read_audio(tone(tmp_path / "good.flac", 440), 16_000)) == 6_400


def test_a_larger_file_is_given_more_time() -> None:
    assert (isolation.SECONDS, isolation.SECONDS_PER_MB) == (60, 1)


def test_a_decoder_ends_itself_when_its_c_code_never_returns() -> None:
    program = """
        import re
        from bridgekit.decoding.isolation import _Alarm
        with _Alarm(0.5):
            re.match(r"(a+)+$", "a" * 50 + "b")  # takes years, in C, and no signal handler in Python would run
    """
    assert python(program).returncode == -signal.SIGALRM


def test_a_decoder_killed_between_two_files_fails_neither(tmp_path: Path) -> None:
    good = tone(tmp_path / "good.flac", 440)
    read_audio(good, 16_000)
    (decoder,) = isolation._pool.decoders
    decoder.process.kill()
    decoder.process.wait()
    assert len(read_audio(good, 16_000)) == 6_400
    assert len(decoder_ids()) == 1


@on_linux
def test_a_file_that_takes_too_much_memory_is_refused_and_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "MEMORY_CAP", 300 << 20)
    Image.new("RGB", (9_000, 9_000)).save(tmp_path / "large.png")  # 324 MB once it is unpacked
    with pytest.raises(ItemError, match=r"decoding it takes over 0\.29\d* GB of memory") as caught:
        read_image(tmp_path / "large.png")
    assert caught.value.remedy
    assert media.peak_memory() < 300 << 20
    Image.new("RGB", (90, 90)).save(tmp_path / "small.png")
    assert read_image(tmp_path / "small.png").size == (90, 90)


def test_a_thread_has_a_decoder_to_itself_and_hands_it_on(tmp_path: Path) -> None:
    paths = [tone(tmp_path / f"{number}.flac", 200 + 50 * number) for number in range(16)]
    for path in paths:
        read_audio(path, 16_000)
    assert len(decoder_ids()) == 1
    alone = [read_audio(path, 16_000) for path in paths]
    for _ in range(3):  # threads come and go
        with ThreadPoolExecutor(4) as pool:
            for one, other in zip(alone, pool.map(lambda path: read_audio(path, 16_000), paths), strict=True):
                np.testing.assert_array_equal(one, other)
    assert 1 <= len(decoder_ids()) <= 4


def test_decoders_are_bounded_however_many_threads_decode_and_idle_ones_are_retired(tmp_path: Path) -> None:
    path = tone(tmp_path / "good.flac", 440)
    with ThreadPoolExecutor(4 * isolation.MOST) as pool:
        assert set(pool.map(lambda _: len(read_audio(path, 16_000)), range(8 * isolation.MOST))) == {6_400}
    ids = decoder_ids()
    assert 1 <= len(ids) <= isolation.MOST
    isolation.retire_idle(60)
    assert decoder_ids() == ids
    with isolation._pool.borrowed() as used:
        isolation.retire_idle(0)
        assert decoder_ids() == [used.process.pid]
    assert all(is_gone(pid) for pid in ids if pid != used.process.pid)
    isolation.retire_idle(0)
    assert decoder_ids() == []
    assert len(read_audio(path, 16_000)) == 6_400


@on_linux
def test_descriptors_threads_and_processes_do_not_leak(tmp_path: Path) -> None:
    good, bad = tone(tmp_path / "good.flac", 440), tmp_path / "bad.png"
    bad.write_bytes(b"no picture")

    def read(number: int) -> None:
        if number % 40 == 7:  # the file that it decodes then, or would decode next, fails
            os.kill(decoder_ids()[0], signal.SIGKILL)
        with contextlib.suppress(BridgekitError):
            read_image(bad) if number % 2 else read_audio(good, 16_000)

    def held() -> tuple[int, int, int]:
        isolation._pool.close()
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), len(children_of(os.getpid()))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(read, range(20)))
        before = held()
        list(pool.map(read, range(200)))
        assert len(children_of(os.getpid())) > before[2]
        assert held() == before


def children_of(pid: int) -> list[int]:
    """A process's children, including those that have ended and were not waited for."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text(encoding="ascii").split()]


def python(program: str, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """A program run to its end by another interpreter."""
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False, **options)  # type: ignore[call-overload, no-any-return]


def is_gone(pid: int) -> bool:
    """Whether a process has ended, even if its parent has not noticed yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


READ_AND_TELL = """
    import sys
    from pathlib import Path
    from bridgekit.decoding.isolation import decoder_ids
    from bridgekit.media import read_audio
    read_audio(Path(sys.argv[1]), 16_000)
    print(*decoder_ids(), flush=True)
"""


@on_linux
def test_a_process_that_ends_leaves_no_decoder(tmp_path: Path) -> None:
    told = python(READ_AND_TELL, str(tone(tmp_path / "good.flac", 440)))
    assert told.stderr == ""
    wait_until(lambda: is_gone(int(told.stdout)))


@on_linux
@pytest.mark.parametrize("busy", [True, False])
def test_a_process_that_is_killed_leaves_no_decoder(tmp_path: Path, long_clip: Path, busy: bool) -> None:
    further = "read_audio(Path(sys.argv[2]), 16_000)\n" if busy else ""
    program = textwrap.dedent(READ_AND_TELL) + further + "sys.stdin.read()"
    command = [sys.executable, "-c", program, str(tone(tmp_path / "good.flac", 440)), str(long_clip)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        decoder = int(process.stdout.readline())
        if busy:
            wait_until(lambda: has_open(decoder, long_clip))
        assert not is_gone(decoder)
        process.kill()
    wait_until(lambda: is_gone(decoder))


@on_linux
def test_control_c_reaches_the_program_and_not_its_decoders(tmp_path: Path) -> None:
    # Where the tests run in the background of a shell, Ctrl-C is ignored by all that they start.
    program = textwrap.dedent(READ_AND_TELL) + textwrap.dedent("""
        import signal
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            print("ready", flush=True)
            sys.stdin.read()
        except KeyboardInterrupt:
            read_audio(Path(sys.argv[1]), 16_000)
            print(*decoder_ids(), flush=True)
    """)
    command = [sys.executable, "-c", program, str(tone(tmp_path / "good.flac", 440))]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        before = process.stdout.readline()
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout.readline() == before


@on_linux
def test_a_fork_has_decoders_of_its_own(tmp_path: Path) -> None:
    program = """
        import os, sys
        from pathlib import Path
        from bridgekit.decoding.isolation import decoder_ids
        from bridgekit.media import read_audio
        low, high = map(Path, sys.argv[1:])
        read_audio(low, 16_000)
        parents, pipes = decoder_ids(), len(os.listdir("/proc/self/fd"))
        child = os.fork()
        if child == 0 and (decoder_ids() or len(os.listdir("/proc/self/fd")) != pipes - 2):
            os._exit(2)  # a pipe held here would keep the decoder when the parent is gone
        path = high if child == 0 else low
        length = {len(read_audio(path, 16_000)) for _ in range(100)}
        mine = decoder_ids()
        if child == 0:
            os._exit(0 if length == {16_000} and mine != parents else 1)
        assert length == {8_000} and mine == parents, (length, mine, parents)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    """
    low, high = tone(tmp_path / "low.flac", 220, 0.5), tone(tmp_path / "high.wav", 880, 1.0)
    told = python(program, str(low), str(high))
    assert (told.returncode, told.stderr) == (0, "")


def test_code_in_the_working_directory_is_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "downloads"
    trap.mkdir()
    for name in ("numpy", "soundfile", "json", "bridgekit", "PIL"):
        (trap / f"{name}.py").write_text("from pathlib import Path\nPath(__file__).with_suffix('.sprung').touch()\n")
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(READ_AND_TELL))
    good = tone(tmp_path / "good.flac", 440)
    told = subprocess.run(
        [sys.executable, script, good], capture_output=True, text=True, timeout=PATIENCE, check=True, cwd=trap
    )
    assert told.stdout.strip().isdigit()
    assert not list(trap.glob("*.sprung"))


def test_a_relative_path_is_read_where_the_program_is_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, seconds in (("one", 0.5), ("two", 1.0)):
        tone(tmp_path / folder / "clip.wav", 440, seconds)
    (tmp_path / "two" / "bad.wav").write_bytes(b"no sound")
    monkeypatch.chdir(tmp_path / "one")
    assert len(read_audio(Path("clip.wav"), 16_000)) == 8_000
    monkeypatch.chdir(tmp_path / "two")
    assert len(read_audio(Path("clip.wav"), 16_000)) == 16_000
    with pytest.raises(ItemError) as caught:
        read_audio(Path("bad.wav"), 16_000)
    assert caught.value.where == "bad.wav"


@pytest.mark.parametrize("program", ["missing", "failing"])
def test_a_decoder_that_cannot_be_started_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    python_of_mine = tmp_path / "python"
    if program == "failing":
        python_of_mine.write_text("#!/bin/sh\nexit 3\n")
        python_of_mine.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python_of_mine))
    with pytest.raises(BridgekitError, match="the process that decodes files cannot be started") as caught:
        read_audio(tone(tmp_path / "good.flac", 440), 16_000)
    assert not isinstance(caught.value, ItemError)
    assert caught.value.where == str(python_of_mine)
    assert decoder_ids() == []


# ---- tables


def refused_table(path: Path) -> str:
    with pytest.raises(BridgekitError) as caught:
        read_pairs(path, ("audio", "text"))
    assert str(caught.value.where).startswith(str(path))
    assert caught.value.remedy
    return caught.value.what


def write_table(path: Path, words: list[str]) -> Path:
    pq.write_table(pa.table({"audio": [f"{number}.wav" for number in range(len(words))], "text": words}), path)
    return path


@pytest.mark.parametrize(
    "change", [lambda data: data[:-100], lambda data: data[: len(data) // 2] + bytes(200), lambda data: b"PAR1"]
)
def test_a_broken_parquet_table_is_one_message(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    path = write_table(tmp_path / "table.parquet", [f"a dog, {number}" for number in range(500)])
    path.write_bytes(change(path.read_bytes()))
    assert refused_table(path).startswith("this is not a Parquet file, or it is damaged")


def repeated(path: Path, length: int, rows: int, **options: object) -> Path:
    """A table that repeats one long text, which is stored, and counted, once."""
    words = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), ["a" * length])
    pq.write_table(pa.table({"audio": words, "text": words}), path, **options)
    assert path.stat().st_size < 1_000_000
    return path


@pytest.mark.parametrize("known_to_be_a_dictionary", [True, False])
def test_a_small_table_that_unpacks_to_gigabytes_is_refused(tmp_path: Path, known_to_be_a_dictionary: bool) -> None:
    path = repeated(tmp_path / "table.parquet", 1_000_000, 20_000, store_schema=known_to_be_a_dictionary)
    assert "over 3 GB of memory" in refused_table(path)


def test_cells_that_unpack_to_more_than_a_reply_may_hold_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_BYTES", 100 << 20)
    path = repeated(tmp_path / "table.parquet", 1_000, 200_000)
    with pytest.raises(ItemError, match=r"has 200,000 rows that unpack to over"):
        tables.read_cells(path, "text", 0, 200_000)


def test_texts_that_take_more_than_a_table_may_hold_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow, "MAX_TABLE", 1 << 20)
    texts = [f"{number:0100}" for number in range(20_000)]
    pq.write_table(pa.table({"audio": texts, "text": texts}), tmp_path / "table.parquet")
    assert "the texts take over" in refused_table(tmp_path / "table.parquet")


def test_a_table_of_too_many_rows_is_refused_before_any_is_read(tmp_path: Path) -> None:
    nothing = pa.nulls(20_000_001, pa.string())
    pq.write_table(pa.table({"audio": nothing, "text": nothing}), tmp_path / "table.parquet")
    assert "the table has 20,000,001 rows, over 20,000,000, or claims to" in refused_table(tmp_path / "table.parquet")


# ---- broken media


def test_broken_media_are_read_or_refused_and_the_whole_tool_sets_aside_exactly_the_refused() -> None:
    outcome = media.run(150, seed=6, mixed=8)
    assert outcome.failures == []
    assert outcome.held == outcome.tried == 150
