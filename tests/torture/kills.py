"""Kills align, encode, bind and generate repeatedly and checks for losses: python -m tests.torture.kills 510

Two of three kills happen just before a random file operation (open, rename, fsync, in the middle of a write), one at a random
time. After each kill:
1. everything that was readable before is still readable: other bridges, latents, conditioners, embeddings;
2. every file in its final place is complete: bit-identical to that of an uninterrupted run, or absent.
After each chain of one to four kills of the same command:
3. the next run gives the result of an uninterrupted one and leaves no temporary files.

The commands run in forks of a process that has loaded torch and the starter's encoders. They use small batches, shards and
training, and write shards and checkpoints as often as possible, for many points to interrupt. Some kills hit the real command
with its default settings, `python -m bridgekit`, at a random time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import count, product
from pathlib import Path
from typing import Any

from tests.torture.outcome import Outcome

ROOT = Path(__file__).resolve().parents[2]
#: One in this many kills hits the real command.
FRESH = 25
#: Locks and temporary files.
HIDDEN = re.compile(r"(^|/)\.[^/]+\.(part|old|lock)(/|$)")


@dataclass(frozen=True)
class Verb:
    """A command to be killed.

    Arguments:
        name: its name in reports.
        arguments: command-line arguments, relative to a workshop.
        encoded: whether all latents are cached at the start.
    """

    name: str
    arguments: Sequence[str]
    encoded: bool = False


VERBS = (
    Verb("encode", ["encode", "--pairs", "data/pictures.csv"]),
    Verb("align", ["align", "--pairs", "data/pictures.csv", "--out", "bridges/new"]),
    Verb("bind", ["bind", "bridges/old", "--add", "audio", "--pairs", "data/sounds.csv"]),
    Verb("align over", ["align", "--pairs", "data/pictures.csv", "--out", "bridges/old", "--seed", "1", "--overwrite"], True),
    Verb(
        "generate",
        [
            *("generate", "--image", "data/pictures/red_disc.png", "--bridge", "bridges/old", "--out", "pictures"),
            *("-n", "2", "--steps", "2", "--size", "64"),
        ],
    ),
)
COLOURS = ("red", "green", "blue", "black", "purple")
SHAPES = ("disc", "square", "bar", "frame")


# ---- running and killing


@dataclass(frozen=True)
class Ended:
    """How a run ended: exit code (negative for a signal), number of file operations if counted, and seconds."""

    code: int
    operations: int
    seconds: float


class Countdown:
    """Counts a process's file operations below a folder and kills it just before operation number `last`."""

    def __init__(self, folder: Path, last: int) -> None:
        self.folder, self.last = str(folder), last
        self.done = 0

    def tick(self, half: Callable[[], object] | None = None) -> None:
        """Count an operation. Before the last, call `half`, which does half of it, and kill the process."""
        self.done += 1
        if self.done == self.last:
            if half:
                half()
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, exchange: bool) -> None:
        """Start counting. Wraps operations without audit events: fsync, writes by libraries, exchanging folders."""
        from safetensors.torch import save

        from bridgekit.storage import cache, sealed

        plain_flush, plain_exchange, plain_save = os.fsync, cache._exchange, sealed.save_file
        plain_bytes, plain_text = Path.write_bytes, Path.write_text

        def flush(descriptor: int) -> None:
            self.tick()
            plain_flush(descriptor)
            self.tick()

        def change(one: Path, other: Path) -> bool:
            self.tick()
            done = exchange and plain_exchange(one, other)
            self.tick()
            return done

        def torn(path: Path, content: bytes) -> Callable[[], object]:
            return lambda: plain_bytes(path, content[: len(content) // 2])

        def save_file(tensors: Any, path: Path, metadata: Any) -> None:
            self.tick(torn(path, save(tensors, metadata)))
            plain_save(tensors, path, metadata)

        def write_bytes(path: Path, content: Any) -> int:
            self.tick(torn(path, bytes(content)))
            return plain_bytes(path, content)

        def write_text(path: Path, text: str, *rest: Any, **options: Any) -> int:
            self.tick(torn(path, text.encode()))
            return plain_text(path, text, *rest, **options)

        os.fsync, cache._exchange, sealed.save_file = flush, change, save_file  # type: ignore[assignment]
        Path.write_bytes, Path.write_text = write_bytes, write_text  # type: ignore[assignment, method-assign]
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            writes = arguments[2] is not None and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not writes:
                return
        elif event not in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "shutil.copyfile"):
            return
        place = arguments[0]
        if isinstance(place, int) or str(Path(os.fsdecode(place)).absolute()).startswith(self.folder):
            self.tick()


def load_all(verbs: Sequence[Verb] = VERBS) -> None:
    """Load what all runs of these verbs need, and make everything small: see the module docstring."""
    import torch

    torch.set_num_threads(1)
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import sklearn.decomposition
    import sklearn.linear_model
    import sklearn.manifold  # noqa: F401

    from bridgekit import plugins
    from bridgekit.bridge import bridge, card
    from bridgekit.diffusion import conditioner
    from bridgekit.fusion import training
    from bridgekit.latents import batches, encode, store
    from bridgekit.recipes import bind, generate, sides
    from bridgekit.report import page, plots

    plain = plugins.load_encoder
    names = {verb.name for verb in verbs}
    needed = ["starter:text", "starter:image", *(["starter:audio"] if "bind" in names else [])]
    opened = {name: plain(name, "cpu") for name in needed}
    for module in (plugins, sides, bind, bridge):
        module.load_encoder = lambda name, device="cpu", revision=None: opened[plugins.encoder_name(name)]  # type: ignore[attr-defined]
    if "generate" in names:
        import diffusers  # noqa: F401

        from bridgekit.diffusion import models

        model = models.open_model("starter:openmoji-64", "cpu")
        generate.open_model = lambda name, device: model  # type: ignore[assignment]
    for templates in (page._TEMPLATES, card._TEMPLATES):  # compile once, not in each fork
        for name in templates.list_templates(["j2"]):
            templates.get_template(name)
    plots._png = lambda figure: b"a placeholder"  # type: ignore[assignment]  # rendering takes time and writes nothing
    # Without the closed-form start, which only takes CPU time.
    small = {"epochs": 6, "batch_size": 8, "shared_dim": 16, "warm_start": 0.0}
    training.PRESETS["default"] = replace(training.PRESETS["default"], **small)  # type: ignore[arg-type]
    training.CHECKPOINT_SECONDS = -1.0
    batches.BATCH_SIZE = batches.MOST = 6
    encode.FLUSH_SECONDS = 0.0
    store.SMALL_SHARD, store.MERGED_ROWS, encode.MANY_DURING, store.MANY_AFTER = 14, 20, 3, 2
    assert conditioner.fit_conditioner.__kwdefaults__
    conditioner.fit_conditioner.__kwdefaults__["fit"] = conditioner.Fit(steps=40, batch_size=16)


def run_forked(workshop: Path, arguments: Sequence[str], last: int = 0, moment: float = 0, exchange: bool = True) -> Ended:
    """Run the command line in a fork of this process.

    Arguments:
        workshop: the folder to run in.
        arguments: command-line arguments.
        last: kill the process before this file operation; 0: never.
        moment: kill it after this many seconds; 0: never.
        exchange: whether two folders can be exchanged atomically, as on Linux and macOS.
    """
    counted = workshop / "home.count"
    counted.unlink(missing_ok=True)
    started = time.monotonic()
    child = os.fork()
    if not child:
        code = 70
        try:
            code = _command_line(workshop, arguments, Countdown(workshop, last), exchange, counted)
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    if moment:
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    operations = int(counted.read_text()) if counted.exists() else 0
    return Ended(os.waitstatus_to_exitcode(status), operations, time.monotonic() - started)


def _command_line(workshop: Path, arguments: Sequence[str], countdown: Countdown, exchange: bool, counted: Path) -> int:
    from bridgekit import cli
    from bridgekit.latents import store
    from bridgekit.storage import cache

    log = os.open(workshop.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(workshop)
    os.environ["BRIDGEKIT_HOME"] = str(workshop / "home")
    sys.argv = ["bridgekit", *arguments]
    cache._swept.clear()  # forget what the parent process did
    store._verified.clear()
    countdown.watch(exchange)
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    countdown.last = 0
    counted.write_text(str(countdown.done))
    return code


def run_fresh(workshop: Path, arguments: Sequence[str], last: int = 0, moment: float = 0, exchange: bool = True) -> Ended:
    """Run the real command in a new process, and kill it after `moment` seconds unless that is 0."""
    started = time.monotonic()
    with workshop.with_suffix(".log").open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "bridgekit", *arguments],
            cwd=workshop,
            env={**os.environ, "BRIDGEKIT_HOME": str(workshop / "home"), "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
        )
        if moment:
            time.sleep(moment)
            child.kill()
        code = child.wait()
    return Ended(code, 0, time.monotonic() - started)


Runner = Callable[..., Ended]


# ---- checking a workshop


@dataclass
class Found:
    """The readable content of a workshop.

    Arguments:
        files: path to the content to compare, without timestamps.
        latents: encoder revision and content hash to the vector.
        broken: files that are incomplete or unreadable.
    """

    files: dict[str, Any] = field(default_factory=dict)
    latents: dict[tuple[str, bytes], bytes] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)


def look(workshop: Path) -> Found:
    """Read everything in a workshop as the commands would."""
    from PIL import Image

    from bridgekit.bridge.bridge import Bridge
    from bridgekit.diffusion.conditioner import load_conditioner
    from bridgekit.errors import BridgekitError
    from bridgekit.storage.cache import put_all_back
    from bridgekit.storage.sealed import read_sealed

    found = Found()
    put_all_back(workshop / "bridges")  # readers do this too
    for path in sorted(workshop.rglob("*")):
        name = path.relative_to(workshop).as_posix()
        if not path.is_file() or HIDDEN.search(name) or name.startswith(("home/latents", "data/")) or name == "home.count":
            continue
        try:
            if name.startswith("home/training"):
                read_sealed(path)  # a checkpoint, not a result
                continue
            if name == "kept.safetensors" or "conditioners/" in name:
                read_sealed(path)
            if "conditioners/" in name and load_conditioner(path) is None:
                raise ValueError("this conditioner cannot be read")
            if path.name == "bridge.json":
                Bridge.load(path.parent, "cpu")
                found.files[name] = _without_times(json.loads(path.read_text()))
            elif path.name in ("README.md", "report.html"):  # with timestamps
                text = path.read_text()
                if path.suffix == ".html" and not text.rstrip().endswith("</html>"):
                    raise ValueError("it is cut short")
                found.files[name] = re.sub(r"\d+", "0", text)
            elif name.startswith("pictures/"):
                with Image.open(path) as picture:
                    found.files[name] = picture.convert("RGB").tobytes()
            else:
                found.files[name] = path.read_bytes()
        except (Exception, BridgekitError) as error:
            found.broken.append(f"{name}: {type(error).__name__}: {error}".replace("\n", " "))
    _look_at_latents(workshop, found)
    return found


def _look_at_latents(workshop: Path, found: Found) -> None:
    from safetensors import safe_open

    from bridgekit.latents import store
    from bridgekit.storage.sealed import read_sealed

    store._verified.clear()
    for folder in sorted((workshop / "home" / "latents").glob("*")):
        shards = sorted(folder.glob("*.safetensors"))
        for shard in shards:
            try:
                read_sealed(shard)
            except Exception as error:
                found.broken.append(f"{shard.relative_to(workshop)}: {type(error).__name__}: {error}")
        if not shards or found.broken:
            continue
        with safe_open(shards[0], "np") as file:
            revision, dim = file.metadata()["revision"], file.get_slice("latents").get_shape()[1]
        latents = store.LatentStore(revision, dim, workshop / "home" / "latents")
        digests = sorted({digest.tobytes() for shard in latents._shards.values() for digest in shard.digests})
        for digest, vector in zip(digests, latents.read(digests).numpy(), strict=True):
            found.latents[revision, digest] = vector.tobytes()


def _without_times(metadata: Any) -> Any:
    """A bridge's metadata without fields that differ between runs."""
    if isinstance(metadata, dict):
        varying = ("seconds", "made", "command", "machine")
        return {key: _without_times(value) for key, value in metadata.items() if key not in varying}
    return [_without_times(value) for value in metadata] if isinstance(metadata, list) else metadata


def problems(before: Found, after: Found, start: Found, end: Found) -> list[str]:
    """What is wrong after a kill.

    Arguments:
        before, after: content before the run and after the kill.
        start, end: content before and after an uninterrupted run.
    """
    wrong = [f"broken: {what}" for what in after.broken]
    for name in start.files:
        if name not in after.files and not any(what.startswith(name) for what in after.broken):
            wrong.append(f"lost: {name}")
    for name, content in after.files.items():
        if content not in [found.files[name] for found in (start, end) if name in found.files]:
            wrong.append(f"neither old nor new: {name}")
    wrong += _mixed(after, start, end)
    wrong += [f"lost: latents of {revision}" for revision, digest in before.latents.keys() - after.latents.keys()]
    wrong += [f"other latents of {key[0]}" for key, vector in after.latents.items() if end.latents.get(key, vector) != vector]
    return list(dict.fromkeys(wrong))


def _mixed(after: Found, start: Found, end: Found) -> list[str]:
    """Bridges whose files are partly old and partly new."""
    wrong = []
    for bridge in {name.rsplit("/", 1)[0] for name in after.files if name.endswith("bridge.json")}:
        for whole in (start, end):
            parts = {name for name in whole.files if name.startswith(f"{bridge}/") and "conditioners/" not in name}
            if parts and all(after.files.get(name) == whole.files[name] for name in parts):
                break
        else:
            wrong.append(f"a mixture: {bridge}")
    return wrong


def unfinished(workshop: Path, ended: Ended, after: Found, end: Found) -> list[str]:
    """What is wrong after the next run."""
    if ended.code:
        last = workshop.with_suffix(".log").read_text(errors="replace").splitlines()[-3:]
        return [f"the next run ended with {ended.code}: {' / '.join(last)}"]
    wrong = [f"broken: {what}" for what in after.broken]
    for name in after.files.keys() | end.files.keys():
        if after.files.get(name) != end.files.get(name):
            wrong.append(f"{name} differs after the next run")
    if after.latents != end.latents:
        wrong.append("latents differ after the next run")
    aside = [path.name for path in (workshop / "bridges").iterdir() if path.name.startswith(".")]
    if aside and not workshop.name.startswith(("encode", "generate")):
        wrong.append(f"temporary files are left: {', '.join(aside)}")
    return wrong


# ---- workshops


@dataclass(frozen=True)
class Reference:
    """A verb, the workshop it starts in, and the content before and after an uninterrupted run."""

    verb: Verb
    workshop: Path
    start: Found
    end: Found
    operations: int
    seconds: float
    fresh: bool

    @property
    def run(self) -> Runner:
        """The function that runs it."""
        return run_fresh if self.fresh else run_forked


def make_workshop(folder: Path, verbs: Sequence[Verb] = VERBS) -> None:
    """Images, sounds and names, two bridges, embeddings, some latents; for `generate` also a conditioner and an image."""
    import numpy as np
    import soundfile
    from PIL import Image, ImageDraw

    (folder / "data" / "pictures").mkdir(parents=True)
    pictures, sounds = ["image,text"], ["audio,text"]
    for number, (colour, shape) in enumerate(product(COLOURS, SHAPES)):
        picture = Image.new("RGB", (64, 64), "white")
        pen = ImageDraw.Draw(picture)
        if shape == "disc":
            pen.ellipse((12, 12, 52, 52), fill=colour)
        else:
            box = {"square": (12, 12, 52, 52), "bar": (4, 24, 60, 40), "frame": (8, 8, 56, 56)}[shape]
            pen.rectangle(box, fill=None if shape == "frame" else colour, outline=colour, width=8)
        picture.save(folder / "data" / "pictures" / f"{colour}_{shape}.png")
        time = np.arange(3_200 + 40 * number) / 16_000
        soundfile.write(folder / "data" / f"{number}.wav", 0.5 * np.sin(2 * np.pi * 150 * 1.15**number * time), 16_000)
        pictures.append(f"pictures/{colour}_{shape}.png,{colour} {shape}")
        sounds.append(f"{number}.wav,{colour} {shape}")
    for name, rows in (("pictures", pictures), ("sounds", sounds), ("few", pictures[:11])):
        (folder / "data" / f"{name}.csv").write_text("\n".join(rows), encoding="utf-8")

    def run(*arguments: str) -> None:
        ended = run_forked(folder, arguments)
        assert ended.code == 0, folder.with_suffix(".log").read_text()

    run("align", "--pairs", "data/pictures.csv", "--out", "bridges/old")
    shutil.move(folder / "home", folder / "full")
    (folder / "home").mkdir()
    for note in (folder / "full").glob("products-*"):  # measure the fastest matrix product only once
        shutil.copy(note, folder / "home")
    run("align", "--pairs", "data/few.csv", "--out", "bridges/keep", "--seed", "3")
    if any(verb.name == "generate" for verb in verbs):
        kept = ["--bridge", "bridges/keep", "--out", "pictures/kept.png"]
        run("generate", "--text", "disc", *kept, "--steps", "2", "--size", "64")
    run("embed", "disc", "square", "--bridge", "bridges/keep", "--out", "kept.safetensors")


def refer(verb: Verb, made: Path, folder: Path, fresh: bool) -> Reference:
    """Run a verb without interruption in its own workshop."""
    name = f"{verb.name}{'-fresh' if fresh else ''}".replace(" ", "-")
    workshop = copy_of(made, folder / f"{name}-start")
    if verb.encoded:
        shutil.rmtree(workshop / "home")
        shutil.copytree(workshop / "full", workshop / "home")
    shutil.rmtree(workshop / "full")
    undisturbed = copy_of(workshop, folder / f"{name}-end")
    ended = (run_fresh if fresh else run_forked)(undisturbed, verb.arguments)
    assert ended.code == 0, undisturbed.with_suffix(".log").read_text()
    return Reference(verb, workshop, look(workshop), look(undisturbed), ended.operations, ended.seconds, fresh)


def copy_of(workshop: Path, to: Path) -> Path:
    return Path(shutil.copytree(workshop, to))


# ---- chains of kills


@dataclass(frozen=True)
class Chain:
    """Consecutive kills of a verb before a run is allowed to finish."""

    seed: str
    kills: int
    reference: Reference


@dataclass(frozen=True)
class Result:
    """Result of a chain: the number of kills, of those survived, what went wrong, and the number of temporary files."""

    killed: int
    held: int
    wrong: Sequence[str]
    left: int


def survive(chain: Chain) -> Result:
    """Run a chain and check after each kill."""
    reference, draw = chain.reference, random.Random(chain.seed)
    exchange = draw.random() < 0.75
    killed = held = 0
    wrong: list[str] = []
    with _workshop(reference) as workshop:
        before = reference.start
        while killed < chain.kills and not wrong:
            if reference.fresh or draw.random() < 1 / 3:
                plan: dict[str, Any] = {"moment": draw.uniform(0.02, 1.0) * reference.seconds}
            else:
                plan = {"last": draw.randint(1, reference.operations)}
            ended = reference.run(workshop, reference.verb.arguments, exchange=exchange, **plan)
            after = look(workshop)
            if ended.code == -signal.SIGKILL:
                killed += 1
                found = problems(before, after, reference.start, reference.end)
                held += not found
                wrong += [f"{reference.verb.name}, chain {chain.seed}, kill {killed} ({plan}): {what}" for what in found]
                before = after
                continue
            # It finished before the kill: check it like the next run, and start again.
            found = unfinished(workshop, ended, after, reference.end)
            wrong += [f"{reference.verb.name}, chain {chain.seed}, after kill {killed}: {what}" for what in found]
            _begin_again(reference, workshop)
            before = reference.start
        left = sum(1 for path in workshop.rglob(".*") if HIDDEN.search(path.name))
        if not wrong:
            ended = reference.run(workshop, reference.verb.arguments)
            found = unfinished(workshop, ended, look(workshop), reference.end)
            wrong += [f"{reference.verb.name}, chain {chain.seed}, at its end: {what}" for what in found]
            held -= bool(found)
    return Result(killed, held, wrong, left)


@contextmanager
def _workshop(reference: Reference) -> Iterator[Path]:
    name = reference.verb.name.replace(" ", "-")
    workshop = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=reference.workshop.parent))
    _begin_again(reference, workshop)
    try:
        yield workshop
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
        workshop.with_suffix(".log").unlink(missing_ok=True)


def _begin_again(reference: Reference, workshop: Path) -> None:
    shutil.rmtree(workshop)
    shutil.copytree(reference.workshop, workshop)


def plan_chains(kills: int, seed: int, references: Sequence[Reference]) -> list[Chain]:
    """Chains with this many kills in total, spread evenly over the verbs."""
    quick = [reference for reference in references if not reference.fresh]
    fresh = [reference for reference in references if reference.fresh]
    chains: list[Chain] = []
    left = {False: kills - kills // FRESH, True: kills // FRESH}
    for number in count():
        real = bool(fresh) and left[True] > 0 and number % 5 == 4
        if not left[False] and not left[True]:
            return chains
        if not left[real]:
            real = not real
        if real and not fresh:
            left[False], left[True] = left[False] + left[True], 0
            real = False
        length = min(left[real], random.Random(f"{seed}/{number}/length").randint(1, 4))
        left[real] -= length
        group = fresh if real else quick
        before = sum(chain.reference.fresh == real for chain in chains)
        chains.append(Chain(f"{seed}/{number}", length, group[before % len(group)]))
    raise AssertionError


def run(kills: int, seed: int, slots: int, verbs: Sequence[str] = ()) -> Outcome:
    """Run this many kills in new processes, `slots` at a time; of the named verbs, or all."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "120",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, "-m", "tests.torture.kills", str(kills), "--seed", str(seed), "--slots", str(slots), "--json"]
    command += [part for verb in verbs for part in ("--verb", verb)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    return Outcome(**json.loads(done.stdout.splitlines()[-1]))


def run_here(kills: int, seed: int, slots: int, verbs: Sequence[Verb] = VERBS, only: str | None = None) -> Outcome:
    """`run` in this process. Call it first: the process is going to be forked."""
    started = time.monotonic()
    load_all(verbs)
    shared = Path("/dev/shm")
    place = shared if shared.is_dir() and os.access(shared, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="bridgekit-kills-", dir=place))
    try:
        make_workshop(folder / "made", verbs)
        references = [refer(verb, folder / "made", folder, fresh=False) for verb in verbs]
        if kills >= 10 * FRESH:
            references += [refer(verb, folder / "made", folder, fresh=True) for verb in verbs]
        chains = plan_chains(kills, seed, references)
        if only:
            chains = [chain for chain in chains if chain.seed == only]
        prepared = time.monotonic() - started
        with multiprocessing.get_context("fork").Pool(slots, maxtasksperchild=20) as pool:
            results: list[Result] = []
            for result in pool.imap_unordered(survive, chains, chunksize=1):
                results.append(result)
                counts = f"{sum(each.killed for each in results)} kills, {sum(each.held for each in results)} survived"
                print(f"{counts}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
                for what in result.wrong:
                    print(what, file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    wrong = [what for result in results for what in result.wrong]
    killed = sum(result.killed for result in results)
    figures = {
        "completed runs": str(len(chains)),
        "kills of the real command": str(sum(chain.kills for chain in chains if chain.reference.fresh)),
        "file operations per run": ", ".join(f"{each.verb.name} {each.operations}" for each in references if not each.fresh),
        "seconds": f"{time.monotonic() - started:.0f}, of which {prepared:.0f} for preparation",
        "temporary files before a next run, at most": str(max((result.left for result in results), default=0)),
    }
    return Outcome(f"kills (seed {seed})", killed, sum(result.held for result in results), wrong, figures)


def main() -> int:
    """python -m tests.torture.kills KILLS"""
    parser = argparse.ArgumentParser(prog="python -m tests.torture.kills")
    parser.add_argument("kills", type=int)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 1_000_000)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument(
        "--verb", action="append", choices=[verb.name for verb in VERBS], help="only this verb; may be repeated"
    )
    parser.add_argument("--chain", help="only this chain, as named in a failure")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    verbs = [verb for verb in VERBS if verb.name in (options.verb or [verb.name])]
    outcome = run_here(options.kills, options.seed, options.slots, verbs, options.chain)
    if options.json:
        print(json.dumps(asdict(outcome)))
        return 0
    print(f"{outcome.name}: survived {outcome.held} of {outcome.tried}")
    for name, value in outcome.figures.items():
        print(f"  {name}: {value}")
    for what in outcome.failures:
        print(f"  {what}")
    return int(outcome.held < outcome.tried)


if __name__ == "__main__":
    sys.exit(main())
