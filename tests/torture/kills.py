"""Kills align, encode, bind and generate again and again, and looks what is lost: python -m tests.torture.kills 510

Of three kills two come just before a random file operation (an opened file, a rename, an fsync, half of a write) and one at a
random moment of the run. After each kill:
1. everything that could be read before can be read still: other bridges, latents, conditioners, embeddings;
2. what lies in its place is whole: it is what an undisturbed run puts there, bit for bit, or it is absent.
After each chain of one to four kills of the same command:
3. the next run ends with the result of an undisturbed one, and nothing is left lying about.

The commands run in forks of a process that has loaded torch and the starter's encoders once. There batches, shards and
training are small, and shards and checkpoints are written as often as can be, so that there is much to interrupt. Some kills
are of the real command with its own settings, `python -m bridgekit`, at a random moment.
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
#: One of so many kills is of the real command.
FRESH = 25
#: Files that no run puts in place as such: locks, and what is written aside.
HIDDEN = re.compile(r"(^|/)\.[^/]+\.(part|old|lock)(/|$)")


@dataclass(frozen=True)
class Verb:
    """A command to be killed.

    Arguments:
        name: of it.
        arguments: on the command line, in a workshop's folder.
        encoded: whether the cache has all latents already when it begins.
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


# ---- what is killed


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code, negative for a signal; its file operations, where it counted them; its seconds."""

    code: int
    operations: int
    seconds: float


class Countdown:
    """Counts a process's file operations below a folder and kills it just before one of them.

    Arguments:
        folder: where they count.
        last: which of them never comes.
    """

    def __init__(self, folder: Path, last: int) -> None:
        self.folder, self.last = str(folder), last
        self.done = 0

    def tick(self, half: Callable[[], object] | None = None) -> None:
        """One more operation; where it is the last, `half` of it is done first."""
        self.done += 1
        if self.done == self.last:
            if half:
                half()
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, exchange: bool) -> None:
        """From here on. What Python does not tell of is wrapped: flushing, libraries' own writing, folders changing places."""
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

        def save_file(tensors: Any, path: Path, told: Any) -> None:
            self.tick(torn(path, save(tensors, told)))
            plain_save(tensors, path, told)

        def write_bytes(path: Path, content: Any) -> int:
            self.tick(torn(path, bytes(content)))
            return plain_bytes(path, content)

        def write_text(path: Path, text: str, *rest: Any, **options: Any) -> int:
            self.tick(torn(path, text.encode()))
            return plain_text(path, text, *rest, **options)

        os.fsync, cache._exchange, sealed.save_file = flush, change, save_file  # type: ignore[assignment]
        Path.write_bytes, Path.write_text = write_bytes, write_text  # type: ignore[assignment, method-assign]
        sys.addaudithook(self._heard)

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
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
    """Load once what every run of these verbs needs, and make everything small: see this module's docstring."""
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
        module.load_encoder = lambda name, device="cpu": opened[plugins.encoder_name(name)]  # type: ignore[attr-defined]
    if "generate" in names:
        import diffusers  # noqa: F401

        from bridgekit.diffusion import models

        model = models.open_model("starter:openmoji-64", "cpu")
        generate.open_model = lambda name, device: model  # type: ignore[assignment]
    for templates in (page._TEMPLATES, card._TEMPLATES):  # compiled once, not once a fork
        for name in templates.list_templates(["j2"]):
            templates.get_template(name)
    plots._png = lambda figure: b"drawn elsewhere"  # type: ignore[assignment]  # written like the real one, in no time
    # Without the closed-form start, which is computing and nothing else.
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
        workshop: the folder to run it in.
        arguments: the command's.
        last: which of its file operations it is to be killed before; 0 for none.
        moment: after how many seconds it is to be killed; 0 for never.
        exchange: whether two folders can change places in one step, as on Linux and macOS.
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
    cache._swept.clear()  # what the process that was forked has done is not this one's
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
    """Run the real command in a process of its own, and kill it after `moment` seconds, if that is not 0."""
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


# ---- what is looked at afterwards


@dataclass
class Found:
    """What can be read in a workshop.

    Arguments:
        files: path to what is compared of a file: its bytes, or what of them does not tell the time.
        latents: content hash and encoder to the vector.
        broken: what lies in its place and is not whole.
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
    put_all_back(workshop / "bridges")  # as every reader does
    for path in sorted(workshop.rglob("*")):
        name = path.relative_to(workshop).as_posix()
        if not path.is_file() or HIDDEN.search(name) or name.startswith(("home/latents", "data/")) or name == "home.count":
            continue
        try:
            if name.startswith("home/training"):
                read_sealed(path)  # where a run stands: not a result
                continue
            if name == "kept.safetensors" or "conditioners/" in name:
                read_sealed(path)
            if "conditioners/" in name and load_conditioner(path) is None:
                raise ValueError("this conditioner cannot be read")
            if path.name == "bridge.json":
                Bridge.load(path.parent, "cpu")
                found.files[name] = _without_times(json.loads(path.read_text()))
            elif path.name in ("README.md", "report.html"):  # they tell times
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


def _without_times(story: Any) -> Any:
    """A bridge's story without what no two runs have alike."""
    if isinstance(story, dict):
        return {
            key: _without_times(value) for key, value in story.items() if key not in ("seconds", "made", "command", "machine")
        }
    return [_without_times(value) for value in story] if isinstance(story, list) else story


def problems(before: Found, after: Found, start: Found, end: Found) -> list[str]:
    """What is not as it has to be after a kill.

    Arguments:
        before, after: what was found before the run, and after the kill.
        start, end: what an undisturbed run finds, and what it leaves.
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
    """Bridges that are in part the old one and in part the new one: of those that there are, all files have to be of one."""
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
    """What is not as it has to be after the next run."""
    if ended.code:
        last = workshop.with_suffix(".log").read_text(errors="replace").splitlines()[-3:]
        return [f"the next run ended with {ended.code}: {' / '.join(last)}"]
    wrong = [f"broken: {what}" for what in after.broken]
    for name in after.files.keys() | end.files.keys():
        if after.files.get(name) != end.files.get(name):
            wrong.append(f"the next run has another {name}")
    if after.latents != end.latents:
        wrong.append("the next run has other latents")
    aside = [path.name for path in (workshop / "bridges").iterdir() if path.name.startswith(".")]
    if aside and not workshop.name.startswith(("encode", "generate")):
        wrong.append(f"left lying about: {', '.join(aside)}")
    return wrong


# ---- workshops


@dataclass(frozen=True)
class Reference:
    """A verb, the workshop that it starts in, and what an undisturbed run of it finds and leaves."""

    verb: Verb
    workshop: Path
    start: Found
    end: Found
    operations: int
    seconds: float
    fresh: bool

    @property
    def run(self) -> Runner:
        """How to run it."""
        return run_fresh if self.fresh else run_forked


def make_workshop(folder: Path, verbs: Sequence[Verb] = VERBS) -> None:
    """Pictures, sounds and their names; two bridges; embeddings; a few latents; for `generate`, a conditioner and an image."""
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
    for note in (folder / "full").glob("products-*"):  # what this machine multiplies fastest is asked once
        shutil.copy(note, folder / "home")
    run("align", "--pairs", "data/few.csv", "--out", "bridges/keep", "--seed", "3")
    if any(verb.name == "generate" for verb in verbs):
        kept = ["--bridge", "bridges/keep", "--out", "pictures/kept.png"]
        run("generate", "--text", "disc", *kept, "--steps", "2", "--size", "64")
    run("embed", "disc", "square", "--bridge", "bridges/keep", "--out", "kept.safetensors")


def refer(verb: Verb, made: Path, folder: Path, fresh: bool) -> Reference:
    """Run a verb undisturbed, in a workshop of its own."""
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
    """Kills of one verb, one after the other, before a run is let finish."""

    seed: str
    kills: int
    reference: Reference


@dataclass(frozen=True)
class Result:
    """What became of a chain: how many kills there were, after how many all was well, and what was not."""

    killed: int
    held: int
    wrong: Sequence[str]
    left: int


def survive(chain: Chain) -> Result:
    """Make the kills of a chain and look after each."""
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
            # It ended before it was killed: as good as the next run, and then there is a new beginning.
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
    """So many kills, over all verbs alike."""
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
    """Make so many kills, in so many workshops at once, in processes of their own; of some verbs alone, if any are named."""
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
    """`run` in this process, which must have run nothing yet: it is going to be forked."""
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
                told = f"{sum(each.killed for each in results)} kills, {sum(each.held for each in results)} survived"
                print(f"{told}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
                for what in result.wrong:
                    print(what, file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    wrong = [what for result in results for what in result.wrong]
    killed = sum(result.killed for result in results)
    figures = {
        "runs let finish": str(len(chains)),
        "of the real command": str(sum(chain.kills for chain in chains if chain.reference.fresh)),
        "file operations of a run": ", ".join(f"{each.verb.name} {each.operations}" for each in references if not each.fresh),
        "seconds": f"{time.monotonic() - started:.0f}, {prepared:.0f} of them to prepare",
        "left aside before a next run, at most": str(max((result.left for result in results), default=0)),
    }
    return Outcome(f"kills (seed {seed})", killed, sum(result.held for result in results), wrong, figures)


def main() -> int:
    """python -m tests.torture.kills KILLS"""
    parser = argparse.ArgumentParser(prog="python -m tests.torture.kills")
    parser.add_argument("kills", type=int)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 1_000_000)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--verb", action="append", choices=[verb.name for verb in VERBS], help="only this one, or these")
    parser.add_argument("--chain", help="only this one, as a failure names it")
    parser.add_argument("--json", action="store_true")
    told = parser.parse_args()
    verbs = [verb for verb in VERBS if verb.name in (told.verb or [verb.name])]
    outcome = run_here(told.kills, told.seed, told.slots, verbs, told.chain)
    if told.json:
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
