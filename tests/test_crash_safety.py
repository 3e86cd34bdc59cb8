"""Files on disk survive killed processes and failing disks; the long version is tests/torture/kills.py."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bridgekit import Bridge, BridgekitError, align
from bridgekit import hardware as precision
from bridgekit.bridge.bridge import _held
from bridgekit.cli import main
from bridgekit.cli.common import newest_bridge
from bridgekit.encoders import Encoder
from bridgekit.fusion import training
from bridgekit.latents import encode
from bridgekit.latents.batches import FLOAT32, Precision
from bridgekit.latents.encode import encode_items
from bridgekit.latents.store import LatentStore
from bridgekit.plugins import load_encoder
from bridgekit.recipes import fit
from bridgekit.recipes.align import AlignOptions, run_alignment
from bridgekit.recipes.bind import BindOptions, run_binding
from bridgekit.storage import cache, locks
from bridgekit.storage.cache import put_back, write_atomically, write_folder_atomically, write_text_atomically
from bridgekit.storage.sealed import DamagedFile, read_sealed, write_sealed
from tests.conftest import Run
from tests.painting import Workshop
from tests.shared import Fork, wait_until
from tests.test_align import QUICK, adapters
from tests.test_bridge import untrained
from tests.torture import kills
from tests.toys import ToneEncoder, tone_table

ROOT = Path(__file__).resolve().parents[1]
WORDS = [f"the {colour} {thing}" for colour in ("red", "green", "blue", "old") for thing in ("dog", "cat", "owl", "fox", "bee")]


@pytest.fixture(scope="module")
def minilm() -> Encoder:
    return load_encoder("starter:text", "cpu")


def flip(path: Path, at: int, bit: int = 3) -> None:
    """Flip one bit of a file, as a bad disk does."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def stored(store: LatentStore) -> int:
    """How many different items a store has."""
    return len({digest.tobytes() for shard in store._shards.values() for digest in shard.digests})


def aside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob(".*"))


# ---- killed at random moments


def test_kills_at_random_moments_lose_nothing_and_the_next_run_ends_as_an_undisturbed_one() -> None:
    # Two chains: in one, two folders can be exchanged in a single step; in the other, they cannot.
    outcome = kills.run(4, seed=5, slots=2, verbs=["align"])
    assert not outcome.failures
    assert outcome.held == outcome.tried == 4


# ---- files


def test_a_flipped_bit_anywhere_in_a_sealed_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_sealed(path, {"a": torch.arange(5.0), "b": torch.tensor(3), "c": torch.ones(2, 2) > 0}, {"of": "öäü"})
    tensors, told = read_sealed(path)
    assert tensors["a"].tolist() == [0, 1, 2, 3, 4]
    assert told["of"] == "öäü"
    whole = path.read_bytes()
    for at in range(len(whole)):
        flip(path, at, at % 8)
        with pytest.raises(DamagedFile):
            read_sealed(path)
        flip(path, at, at % 8)


def test_a_sealed_file_of_the_same_content_is_the_same_to_the_byte(tmp_path: Path) -> None:
    told = {"of": 'öäü "骨" \n\x01\x7f\\ /', "conditioner": "{}", "revision": "x"}
    written = set()
    for number in range(8):
        path = tmp_path / f"{number}.safetensors"
        write_sealed(path, {"b": torch.ones(3), "a": torch.zeros(2, 2)}, told)
        assert {**told, **read_sealed(path)[1]} == read_sealed(path)[1]
        written.add(path.read_bytes())
    assert len(written) == 1


def test_a_file_is_flushed_before_it_is_renamed_into_place_and_its_folder_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    flush, rename, exchange = os.fsync, Path.replace, cache._exchange

    def flushed(descriptor: int) -> None:
        done.append(f"fsync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        flush(descriptor)

    def renamed(source: Path, to: Path) -> Path:
        done.append(f"rename {source.name} to {to.name}")
        return rename(source, to)

    def exchanged(one: Path, other: Path) -> bool:
        done.append(f"exchange {one.name} {other.name}")
        return exchange(one, other)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    monkeypatch.setattr(cache, "_exchange", exchanged)
    write_sealed(tmp_path / "x.safetensors", {"a": torch.zeros(2)}, {})
    assert done == ["fsync x.safetensors", "rename x.safetensors to x.safetensors", f"fsync {tmp_path.name}"]
    untrained().save(tmp_path / "b")
    done.clear()
    untrained().save(tmp_path / "b", overwrite=True)
    name = done[-2].split()[1]
    expected = ["README.md", "adapters.safetensors", "bridge.json", "history.jsonl", name]
    assert sorted(done[:-2], key=str.casefold) == sorted((f"fsync {file}" for file in expected), key=str.casefold)
    assert done[-2:] == [f"exchange {name} b", f"fsync {tmp_path.name}"]


def test_leftovers_of_a_killed_process_are_removed_and_files_of_a_live_one_are_not(tmp_path: Path) -> None:
    left = tmp_path / ".x.safetensors.0123456789abcdef0123456789abcdef.part"
    left.mkdir()
    (left / ".tmpAb3dEf").write_text("of safetensors' own")
    cache._swept.discard(tmp_path)
    with cache._writing_in(tmp_path):
        assert not left.exists()
        left.mkdir()
        cache._swept.discard(tmp_path)
        write_text_atomically(tmp_path / "other.txt", "another thread, or another process")
        assert left.exists()
    cache._swept.discard(tmp_path)
    write_text_atomically(tmp_path / "other.txt", "and now nobody writes it any more")
    assert aside(tmp_path) == []


def test_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_sealed(tmp_path / "x.safetensors", {"a": torch.zeros(2)}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text_atomically(path, "old")

    def half(beside: Path) -> None:
        beside.write_text("ne")
        raise OSError(28, os.strerror(28))

    with pytest.raises(BridgekitError, match="No space left on device") as caught:
        write_atomically(path, half)
    assert "larger disk" in str(caught.value)
    assert path.read_text() == "old"
    assert aside(tmp_path) == []


# ---- latents


def test_a_shard_with_a_flipped_bit_is_reported_and_encoded_again_in_the_same_run(
    minilm: Encoder, capsys: pytest.CaptureFixture[str]
) -> None:
    first = encode_items(minilm, WORDS)
    (shard,) = first.folder.glob("*.safetensors")
    whole = shard.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    told = whole.index(b"products")
    for at in (len(whole) - 1, start, len(whole) // 2, told + 13, 3):  # latents, digests, metadata, the header's length
        flip(shard, at)
        again = encode_items(minilm, WORDS)
        assert torch.equal(again.matrix, first.matrix)
        assert again.encoded == len(WORDS)
        assert capsys.readouterr().err.count("removed damaged latents") == 1
        assert encode_items(minilm, WORDS).encoded == 0
        assert not shard.exists()
        for other in first.folder.iterdir():
            other.unlink()
        shard.write_bytes(whole)
    flip(shard, whole.index(b"format"))  # its version is unreadable: it may be a newer one, and is left alone
    assert encode_items(minilm, WORDS).encoded == len(WORDS)
    assert shard.exists()


def test_only_what_was_in_the_damaged_shard_is_encoded_again(minilm: Encoder) -> None:
    encode_items(minilm, WORDS[:8])
    (first,) = LatentStore(minilm.revision, minilm.dim).folder.glob("*.safetensors")
    expected = encode_items(minilm, WORDS)
    flip(first, first.stat().st_size - 7)
    again = encode_items(minilm, WORDS)
    assert again.encoded == 8
    torch.testing.assert_close(again.matrix, expected.matrix)


def test_a_damaged_shard_that_cannot_be_removed_is_skipped(minilm: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    first = encode_items(minilm, WORDS)
    (shard,) = first.folder.glob("*.safetensors")
    flip(shard, shard.stat().st_size - 1)
    plain = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path == shard:
            raise PermissionError(1, os.strerror(1))
        plain(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    for _ in range(2):
        assert torch.equal(encode_items(minilm, WORDS).matrix, first.matrix)
    assert shard.exists()


def test_shards_of_a_newer_version_are_neither_read_nor_merged_nor_removed(
    minilm: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridgekit.latents.store.MANY_AFTER", 2)
    first = encode_items(minilm, WORDS)
    (shard,) = first.folder.glob("*.safetensors")
    with safe_open(shard, "pt") as file:
        told = {**file.metadata(), "format": "3"}
    tensors = load_file(shard)
    tensors["latents"] = tensors["latents"] + 1
    save_file(tensors, shard, told)
    newer = shard.read_bytes()
    again = encode_items(minilm, WORDS)
    assert again.encoded == len(WORDS)
    assert torch.equal(again.matrix, first.matrix)
    encode_items(minilm, ["one more", "and another"])
    assert shard.read_bytes() == newer


def store_of(shards: list[list[int]]) -> LatentStore:
    """A store of numbered contents, whose latents are their numbers."""
    for rows in shards:
        LatentStore("toy", 2).write([bytes([row] * 32) for row in rows], torch.tensor(rows).float()[:, None].expand(-1, 2))
    return LatentStore("toy", 2)


def numbers(store: LatentStore, rows: range) -> list[float]:
    return store.read([bytes([row] * 32) for row in rows])[:, 0].tolist()


def test_merging_never_revives_a_damaged_shard_or_removes_the_only_intact_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridgekit.latents.store.SMALL_SHARD", 10)
    store = store_of([[0, 1], [2, 3], [4, 5], list(range(6, 20))])
    damaged = next(path for path, shard in store._shards.items() if shard.digests[0, 0] == 2)
    flip(damaged, damaged.stat().st_size - 2)
    store.merge_small_shards(3)
    fresh = LatentStore("toy", 2)
    assert [bytes([row] * 32) in fresh for row in range(20)] == [row not in (2, 3) for row in range(20)]
    assert numbers(fresh, range(4, 20)) == list(range(4, 20))


def test_a_process_killed_between_merging_and_removing_leaves_a_usable_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridgekit.latents.store.SMALL_SHARD", 5)
    store_of([[0, 1], [2], [3, 4]])
    for _ in range(12):  # its random name decides which copy is read first: in most of these, the large one
        LatentStore("toy", 2).write([bytes([row] * 32) for row in range(6)], torch.arange(6.0)[:, None].expand(-1, 2))
    store = LatentStore("toy", 2)
    store.merge_small_shards(2)
    assert numbers(LatentStore("toy", 2), range(6)) == list(range(6))
    # One small shard may be left, with the rows whose small copy was read first.
    assert sum(len(shard.digests) < 5 for shard in LatentStore("toy", 2)._shards.values()) <= 1


def test_a_merged_shard_is_no_larger_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridgekit.latents.store.MERGED_ROWS", 8)
    store = store_of([[row, row + 1] for row in range(0, 30, 2)])
    store.merge_small_shards()
    sizes = [len(shard.digests) for shard in LatentStore("toy", 2)._shards.values()]
    assert sum(sizes) == 30
    assert max(sizes) <= 8
    assert numbers(LatentStore("toy", 2), range(30)) == list(range(30))


def test_only_one_process_merges_at_a_time() -> None:
    store = store_of([[0], [1], [2]])
    other = hold_lock(store.folder / ".merging.lock")
    store.merge_small_shards(2)
    assert len(LatentStore("toy", 2)._shards) == 3
    other.kill()
    other.wait()
    store.merge_small_shards(2)
    assert len(LatentStore("toy", 2)._shards) == 1
    assert aside(store.folder) == []


def test_a_damaged_precision_note_is_ignored(minilm: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = Precision("bfloat16", 0.9995)
    monkeypatch.setattr(encode, "check_precision", lambda run, items: found)
    note = tmp_path / "begun-x.json"
    assert encode._precision(None, [], note, True) == found  # type: ignore[arg-type]
    assert encode._precision(None, [], note, False) == found  # type: ignore[arg-type]
    for at in range(note.stat().st_size):
        flip(note, at)
        assert encode._precision(None, [], note, False) == FLOAT32  # type: ignore[arg-type]
        flip(note, at)


def test_the_fastest_product_dtype_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may give another answer the second time, and a resumed run would end with other adapters."""
    monkeypatch.delenv(precision.VARIABLE, raising=False)
    for quick in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(precision, "_seconds", lambda kind, quick=quick: 1.0 if kind == quick else 9.0)
        precision._probed.cache_clear()
        assert precision.product_dtype() == torch.bfloat16
    precision._probed.cache_clear()


# ---- training


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("damage", ["a flipped bit", "cut short", "of another run", "no safetensors"])
def test_training_starts_over_when_its_checkpoint_is_unusable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    table = tone_table(tmp_path, copies=2)
    preset = replace(QUICK, epochs=6)
    align(pairs=table, out=tmp_path / "calm", preset=preset, progress=False)
    monkeypatch.setattr("bridgekit.fusion.checkpoint.CHECKPOINT_SECONDS", -1.0)

    def stop(epoch: int, loss: float) -> None:
        if epoch == 4:
            raise KeyboardInterrupt

    plain = training.train
    monkeypatch.setattr("bridgekit.recipes.fit.train", lambda *rest, **options: plain(*rest, **{**options, "on_epoch": stop}))
    with pytest.raises(KeyboardInterrupt):
        align(pairs=table, out=tmp_path / "wild", preset=preset, progress=False)
    (checkpoint,) = (cache.cache_folder() / "training").iterdir()
    content = checkpoint.read_bytes()
    if damage == "a flipped bit":
        flip(checkpoint, len(content) - 100)
    elif damage == "cut short":
        checkpoint.write_bytes(content[:-10])
    elif damage == "no safetensors":
        checkpoint.write_bytes(b"{}" * 50)
    else:
        tensors, told = read_sealed(checkpoint)
        write_sealed(checkpoint, {name: tensor[..., :1] for name, tensor in tensors.items() if tensor.ndim}, told)
    monkeypatch.setattr("bridgekit.recipes.fit.train", plain)
    capsys.readouterr()
    align(pairs=table, out=tmp_path / "wild", preset=preset, progress=False)
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "training starts again" in line] == said
    assert len(said) == 1
    assert adapters(tmp_path / "wild") == adapters(tmp_path / "calm")


# ---- bridges


def bridges(folder: Path) -> tuple[Bridge, Bridge]:
    one = untrained()
    other = replace(untrained(), temperature=0.01)
    for parameter in other.adapters["text"].parameters():
        parameter.data += 1
    one.save(folder)
    return one, other


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_reader_finds_the_old_bridge_or_the_new_one_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_one_step: bool
) -> None:
    folder = tmp_path / "b"
    both = bridges(folder)
    if not in_one_step:
        monkeypatch.setattr(cache, "_exchange", lambda one, other: False)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for bridge in reversed(both):
                bridge.save(folder, overwrite=True)

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    try:
        reads = 0
        while reads < 100 or len(seen) < 2:
            read = Bridge.load(folder)
            seen.add((read.temperature, read.weights_hash(["audio", "text"])))
            reads += 1
    finally:
        stop.set()
        writer.join()
    assert seen == {(bridge.temperature, bridge.weights_hash(["audio", "text"])) for bridge in both}
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.usefixtures("toy")
def test_a_bridge_that_is_moved_away_and_back_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "b"
    one, _ = bridges(folder)
    reads: list[Path] = []
    load = Bridge._load

    def away(path: Path, device: str) -> Bridge:
        reads.append(path)
        if len(reads) > 1:
            return load(path, device)
        folder.rename(tmp_path / "away")
        try:
            return load(path, device)
        finally:
            (tmp_path / "away").rename(folder)

    monkeypatch.setattr(Bridge, "_load", away)
    assert Bridge.load(folder).temperature == one.temperature
    assert len(reads) == 2


def test_a_new_folder_with_the_inode_of_a_removed_one_is_not_mistaken_for_it(tmp_path: Path) -> None:
    folder = tmp_path / "b"
    folder.mkdir()
    with _held(folder) as still_there:
        assert still_there()
        folder.rmdir()
        assert not still_there()
        folder.mkdir()
        assert not still_there()


@pytest.mark.usefixtures("toy")
def test_a_bridge_that_a_killed_process_moved_away_is_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("bridges") / "b.c"
    bridges(folder)
    moved = Path("bridges") / f".b.c.{'0' * 32}.old"
    unfinished = Path("bridges") / f".b.c.{'1' * 32}.part"
    of_another = Path("bridges") / f".b.{'2' * 32}.part"
    for way in (lambda: Bridge.load(folder), lambda: newest_bridge(), lambda: put_back(folder)):
        folder.rename(moved)
        way()
        assert folder.is_dir()
    folder.rename(moved)
    unfinished.mkdir()
    of_another.mkdir()
    with pytest.raises(BridgekitError, match="--overwrite"):
        untrained().save(folder)
    assert Bridge.load(folder).temperature == untrained().temperature
    untrained().save(folder, overwrite=True)
    assert aside(Path("bridges")) == [of_another.name]


@pytest.mark.usefixtures("toy")
def test_a_bridge_that_is_being_written_is_not_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bridges(Path("bridges/b"))
    bridges(Path("bridges") / f".b.{'0' * 32}.part")
    assert newest_bridge() == Path("bridges/b")


def test_writing_through_a_symlink_replaces_the_folder_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_folder_atomically(tmp_path / "link", lambda folder: (folder / "x").write_text("new"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "x").read_text() == "new"


# ---- several processes


HOLD = """
import sys
from pathlib import Path
from bridgekit.storage.locks import locked
with locked(Path(sys.argv[1])) as held:
    print(held, flush=True)
    sys.stdin.read()
"""


def hold_lock(path: Path) -> subprocess.Popen[bytes]:
    """A process that holds a lock until it is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", HOLD, str(path)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert child.stdout is not None
    assert child.stdout.readline() == b"True\n"
    return child


def test_a_waiting_process_names_the_holder_of_the_lock_and_continues_when_it_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = hold_lock(tmp_path / ".b.lock")
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        threading.Timer(0.2, other.kill).start()

    monkeypatch.setattr(locks, "say", say)
    write_folder_atomically(tmp_path / "b", lambda folder: (folder / "x").write_text("new"))
    other.wait()
    (line,) = said
    assert f"(process {other.pid} on " in line
    assert line.endswith("waiting for it to end")
    assert aside(tmp_path) == []


def test_a_fork_of_the_holder_does_not_hold_the_lock(tmp_path: Path) -> None:
    with cache.one_writer(tmp_path / "b"):
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
    with cache.one_writer(tmp_path / "b") as alone:
        assert alone
    assert os.waitpid(child, os.WNOHANG) == (0, 0), "the child had to end first"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_reading_does_not_wait_for_a_writer(tmp_path: Path) -> None:
    untrained().save(tmp_path / "b")
    other = hold_lock(tmp_path / ".b.lock")
    try:
        Bridge.load(tmp_path / "b")
    finally:
        other.kill()
        other.wait()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder in which every user may write."""
    if os.geteuid():
        pytest.skip("two users take turns: only root can be two users")
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        folder = Path(place) / "all"
        folder.mkdir()
        folder.chmod(0o777)
        yield folder


def as_nobody(work: Callable[[], object], log: Path) -> Fork:
    """A fork that is another user."""

    def run() -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        work()

    return Fork(run, log)


@pytest.mark.parametrize("mode", [0o777, 0o1777], ids=["plain", "sticky"])
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_two_users_take_turns(open_folder: Path, tmp_path: Path, mode: int, umask: int) -> None:
    open_folder.chmod(mode)
    log, before = tmp_path / "log", os.umask(umask)
    log.touch()

    def write() -> None:
        write_folder_atomically(open_folder / "b", lambda folder: (folder / "x").write_text("new"))

    try:
        with cache.one_writer(open_folder / "b") as alone:
            assert alone
            other = as_nobody(write, log)
            wait_until(lambda: "waiting for it to end" in log.read_text() or os.waitpid(other.pid, os.WNOHANG)[0])
            assert f"(process {os.getpid()} on " in log.read_text()
            assert not (open_folder / "b").exists(), "the other user wrote without the lock"
        assert other.wait() == 0, log.read_text()
        assert (open_folder / "b" / "x").exists()
        assert aside(open_folder) == []
    finally:
        os.umask(before)


@pytest.mark.parametrize("mode", [0o644, 0o444])
def test_a_lock_that_another_user_left_is_taken_if_it_can_be_read(open_folder: Path, tmp_path: Path, mode: int) -> None:
    left = open_folder / ".b.lock"
    left.touch()
    left.chmod(mode)
    open_folder.chmod(0o1777)  # so that it cannot be removed

    def work() -> None:
        with locks.locked(left) as held:
            print(held)

    assert as_nobody(work, tmp_path / "log").wait() == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "log").read_text() == "True\n"
    assert left.exists()


def test_without_the_lock_nothing_is_written(open_folder: Path, tmp_path: Path) -> None:
    (open_folder / ".b.lock").touch()
    (open_folder / ".b.lock").chmod(0)

    def work() -> None:
        with pytest.raises(BridgekitError, match="this lock cannot be opened: Permission denied"):
            write_folder_atomically(open_folder / "b", lambda folder: (folder / "x").write_text("new"))

    assert as_nobody(work, tmp_path / "log").wait() == 0, (tmp_path / "log").read_text()
    assert not (open_folder / "b").exists()


def test_where_the_file_system_has_no_locks_this_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    for text in ("old", "new"):
        write_folder_atomically(tmp_path / "b", lambda folder, text=text: (folder / "x").write_text(text))  # type: ignore[misc]
    assert capsys.readouterr().err.count("has no locks") == 1
    assert (tmp_path / "b" / "x").read_text() == "new"
    assert aside(tmp_path) == []


def both_at_once(folder: Path, work: Callable[[], bool]) -> list[list[str]]:
    """Do the same in two processes, of which one trains until the other waits for it; gives the lines that each printed."""
    waits, plain = folder / "one waits", fit.train

    def say(line: str) -> None:
        print(line)
        waits.touch()

    def train(*arguments: object, **options: object) -> object:
        wait_until(waits.exists)
        return plain(*arguments, **options)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locks, "say", say)
        patch.setattr(fit, "train", train)
        logs = [folder / f"{number}.log" for number in range(2)]
        forks = [Fork(lambda: print(work()), log) for log in logs]
        codes = [fork.wait() for fork in forks]
    printed = [log.read_text(encoding="utf-8").splitlines() for log in logs]
    assert codes == [0, 0], printed
    for file in (waits, *logs):
        file.unlink()
    return sorted(printed, key=len)


def test_two_runs_that_write_the_same_bridge_take_turns(tmp_path: Path, workshop: Workshop, picture_toys: object) -> None:
    pairs, gallery, bridge = workshop.folder / "pairs.csv", workshop.folder / "gallery.csv", tmp_path / "b"
    options = AlignOptions(pairs=pairs, out=bridge, preset=QUICK, progress=False)
    for work in (
        lambda: run_alignment(options).reused,
        lambda: run_binding(BindOptions(bridge, "image", gallery, progress=False)).reused,
    ):
        before = Bridge.load(bridge) if bridge.exists() else None
        first, second = both_at_once(tmp_path, work)
        assert first == ["False"]
        assert (len(second), second[-1]) == (2, "True")
        assert "another process is writing" in second[0]
    after = Bridge.load(bridge)
    assert list(after.sides) == ["audio", "text", "image"]
    assert before is not None
    assert after.weights_hash(["audio", "text"]) == before.weights_hash(["audio", "text"])
    assert aside(tmp_path) == []


# ---- full and read-only disks, and interrupts


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    place = tmp_path / "small disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here: that takes root, and a kernel that lets it")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(disk: Path, but: int) -> Path:
    """Fill a file system except for about so many bytes."""
    ballast = disk / "ballast"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    ballast.write_bytes(bytes(max(0, free - but)))
    return ballast


def test_a_full_disk_is_reported_in_one_message_and_encoded_latents_are_kept(
    small_disk: Path, minilm: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRIDGEKIT_HOME", str(small_disk / "home"))
    monkeypatch.setattr(encode, "FLUSH_SECONDS", 0)
    monkeypatch.setattr("bridgekit.latents.batches.MOST", 32)
    many = [f"{word}, number {number}" for number in range(12) for word in WORDS]
    encode_items(minilm, WORDS)
    ballast = fill(small_disk, 150_000)
    with pytest.raises(BridgekitError, match="No space left on device") as caught:
        encode_items(minilm, many)
    assert "$BRIDGEKIT_HOME name a folder on a larger disk" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3
    kept = stored(LatentStore(minilm.revision, minilm.dim))
    assert len(WORDS) < kept < len(many)
    assert aside(small_disk) == []
    ballast.unlink()
    assert encode_items(minilm, many).encoded == len(WORDS) + len(many) - kept
    assert encode_items(minilm, WORDS).encoded == 0


@pytest.mark.usefixtures("toy")
def test_a_bridge_that_does_not_fit_on_the_disk_is_reported_and_the_old_one_stays(small_disk: Path) -> None:
    untrained().save(small_disk / "b")
    fill(small_disk, 4_096)
    with pytest.raises(BridgekitError, match="No space left on device"):
        replace(untrained(), temperature=0.01).save(small_disk / "b", overwrite=True)
    assert Bridge.load(small_disk / "b").temperature == untrained().temperature
    assert aside(small_disk) == []


@pytest.mark.usefixtures("toy")
def test_a_run_continues_when_only_its_checkpoints_do_not_fit_on_the_disk(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BRIDGEKIT_HOME", str(small_disk))
    table = tone_table(tmp_path, copies=2)
    preset = replace(QUICK, epochs=6)
    align(pairs=table, out=tmp_path / "calm", preset=preset, progress=False)
    fill(small_disk, 8_192)
    monkeypatch.setattr("bridgekit.fusion.checkpoint.CHECKPOINT_SECONDS", -1.0)
    align(pairs=table, out=tmp_path / "wild", preset=preset, progress=False)
    assert capsys.readouterr().err.count("training continues without a checkpoint (this cannot be written: No space left") == 1
    assert adapters(tmp_path / "wild") == adapters(tmp_path / "calm")


def test_a_read_only_cache_is_read_and_missing_latents_are_one_message(
    small_disk: Path, minilm: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRIDGEKIT_HOME", str(small_disk))
    expected = encode_items(minilm, WORDS)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert torch.equal(encode_items(minilm, WORDS).matrix, expected.matrix)
    with pytest.raises(BridgekitError, match="Read-only file system") as caught:
        encode_items(minilm, ["something new"])
    assert "let $BRIDGEKIT_HOME name a folder that can be written" in str(caught.value)


@pytest.mark.usefixtures("toy")
def test_a_bridge_in_a_read_only_folder_is_found_again_by_the_same_call(small_disk: Path, tmp_path: Path) -> None:
    table = tone_table(tmp_path, copies=2)
    preset = replace(QUICK, epochs=2)
    run_alignment(AlignOptions(pairs=table, out=small_disk / "b", preset=preset, progress=False))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert run_alignment(AlignOptions(pairs=table, out=small_disk / "b", preset=preset, progress=False)).reused
    with pytest.raises(BridgekitError, match="cannot be written: Read-only file system"):
        run_alignment(AlignOptions(pairs=table, out=small_disk / "b", preset=preset, seed=1, overwrite=True, progress=False))


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("home", ["a file", "below a file"])
def test_a_home_that_is_a_file_is_one_message(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    tone_table(tmp_path, copies=2)
    (tmp_path / "home").write_text("a file")
    monkeypatch.setenv("BRIDGEKIT_HOME", str(tmp_path / "home" / ("" if home == "a file" else "more")))
    for verb in ("encode", "align"):
        code, _, err = run(verb, "--pairs", "pairs.csv")
        assert code == 2
        assert err.splitlines() == [
            "bridgekit: this cannot be written: there is a file where a folder should be",
            f"  in: {tmp_path / 'home'}",
            "  fix: let $BRIDGEKIT_HOME name a folder that can be written",
        ]


@pytest.mark.usefixtures("toy")
def test_a_home_with_spaces_and_non_ascii_letters_works(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tone_table(tmp_path, copies=2)
    monkeypatch.setenv("BRIDGEKIT_HOME", str(tmp_path / "mein Cache – ключ 鍵 'q' #1%"))
    out = "Brücke nach [Norden]"
    assert run("encode", "--pairs", "pairs.csv")[0] == 0
    assert run("align", "--pairs", "pairs.csv", "--out", out)[0] == 0
    assert "Reused the bridge of an earlier run" in run("align", "--pairs", "pairs.csv", "--out", out)[1]
    assert run("align", "--pairs", "pairs.csv", "--out", out, "--seed", "1", "--overwrite")[0] == 0
    assert aside(tmp_path) == []


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_stopped_by_a_signal_says_so_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    tone_table(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bridgekit", "encode", "--pairs", "pairs.csv"])
    tones = ToneEncoder.encode

    def encode(encoder: ToneEncoder, batch: list[torch.Tensor]) -> torch.Tensor:
        if len(encoder.encoded) == 2:
            signal.raise_signal(number)
        return tones(encoder, batch)

    monkeypatch.setattr(ToneEncoder, "encode", encode)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 128 + number
    said = capsys.readouterr().err.split("\n")
    assert [line for line in said if line] == ["bridgekit: stopped. Nothing is lost: run the same command again to continue."]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert stored(LatentStore("toy:tone@1", 64)) == 64
    assert aside(cache.cache_folder()) == []
