"""Attacks with malicious bridges, tables and models. Each must be refused and leave nothing behind."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.torture.alone import run_alone
from tests.torture.command import Ended, call, call_on_terminal, fault, fault_for_people, inside
from tests.torture.outcome import Outcome
from tests.torture.strangers import Ground, ground_for, write_csv

#: Memory that an attack may take, with its largest child, in bytes. Some also do real work, which takes most of it.
LITTLE = 2 << 30
COMMIT = "0123456789abcdef0123456789abcdef01234567"
Attack = Callable[[Ground], None]


def run() -> Outcome:
    """Run every attack once."""
    failures: list[str] = []
    figures: dict[str, str] = {}
    with ground_for("attacks") as ground:
        for attack in ATTACKS:
            wrong, memory = attempt(attack, ground, ground.folder.parent / attack.__name__)
            figures[name_of(attack)] = wrong or f"refused, {memory / 1e6:,.0f} MB"
            failures += [f"{name_of(attack)}: {wrong}"] if wrong else []
    return Outcome("attacks", len(ATTACKS), len(ATTACKS) - len(failures), tuple(failures), figures)


def attempt(attack: Attack, ground: Ground, folder: Path) -> tuple[str, int]:
    """Run one attack on a copy of the ground, in a process of its own; returns what went wrong, or "", and its memory."""
    folder.mkdir()
    wrong, memory = run_alone(_attempt, attack, ground, folder)
    return wrong or ("" if memory < LITTLE else f"it took {memory / 1e6:,.0f} MB of memory"), memory


def _attempt(attack: Attack, ground: Ground, folder: Path) -> str:
    own = ground.copy(folder / "here")
    (folder / "secret.txt").write_text("a secret")
    with inside(own.folder):
        try:
            attack(own)
        except AssertionError as error:
            return str(error) or "it was not refused"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return ""


def name_of(attack: Attack) -> str:
    """The attack's name in reports."""
    return (attack.__doc__ or "").rstrip(".")


def _refused(*arguments: object, saying: str = "") -> Ended:
    """The command must end with an error message that contains this text."""
    ended = call([*arguments, "--json"])
    wrong = fault(ended)
    assert not wrong, wrong
    assert ended.code == 2, f"`{' '.join(map(str, arguments))}` succeeded"
    assert saying in ended.err, f"{saying!r} is not in the message {ended.err!r}"
    return ended


def _result(*arguments: object) -> dict[str, Any]:
    ended = call([*arguments, "--json"])
    wrong = fault(ended) or (ended.err if ended.code else "")
    assert not wrong, wrong
    result: dict[str, Any] = json.loads(ended.out)
    return result


def _shown(*arguments: object) -> str:
    """What a terminal shows, which must have no control characters but line ends."""
    ended = call_on_terminal(arguments)
    wrong = fault_for_people(ended, (0, 1, 2))
    assert not wrong, f"`{arguments[0]}`: {wrong}"
    return ended.out


def _rewrite(bridge: Path, change: Callable[[dict[str, Any]], object]) -> None:
    metadata = json.loads((bridge / "bridge.json").read_text(encoding="utf-8"))
    change(metadata)
    (bridge / "bridge.json").write_text(json.dumps(metadata), encoding="utf-8")


def _sign(bridge: Path, adapters: bytes) -> None:
    (bridge / "adapters.safetensors").write_bytes(adapters)
    _rewrite(bridge, lambda metadata: metadata.update(adapters_sha256=hashlib.sha256(adapters).hexdigest()))


class _Runs:
    """Writes a file when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("open('owned', 'w').write('x')",)


def _table(ground: Ground, *paths: str) -> None:
    """Write the table with these paths in additional first rows."""
    rows = [(path, f"row {number}", "train") for number, path in enumerate(paths)]
    write_csv(ground.folder / "pairs.csv", [("image", "text", "split"), *rows, *ground.rows])


def _set_aside(count: int, *options: str) -> list[str]:
    result = _result("encode", "--pairs", "pairs.csv", "--a", "image", "--b", "text", *options)
    reasons = [row["reason"] for row in result["set_aside"]]
    assert len(reasons) == count, f"{len(reasons)} rows were set aside, not {count}: {reasons}"
    return reasons


# ---- code


def pickle_in_a_checkpoint(ground: Ground) -> None:
    """A checkpoint with a pickle that would write a file."""
    torch.save({"state_dict": _Runs()}, "evil.pth")
    _refused("encode", "--pairs", "pairs.csv", "--a", "timm:test_vit,checkpoint=evil.pth", "--b", "text", saying="evil.pth")
    assert not Path("owned").exists(), "the pickle was run"


def pickle_in_a_bridge(ground: Ground) -> None:
    """A bridge that contains such a checkpoint and names it as its encoder."""
    torch.save(_Runs(), "bridge/evil.pth")
    _rewrite(
        Path("bridge"), lambda metadata: metadata["sides"]["image"].update(encoder="timm:test_vit,checkpoint=bridge/evil.pth")
    )
    _refused("eval", "bridge", "--pairs", "pairs.csv", saying="evil.pth")
    assert not Path("owned").exists(), "the pickle was run"


def remote_code_in_a_bridge(ground: Ground) -> None:
    """A bridge whose encoder is a model with custom code, with trust_remote_code set in the bridge."""
    _own_code(Path("bridge/model"))
    _rewrite(
        Path("bridge"),
        lambda metadata: metadata["sides"]["text"].update(encoder="transformers:bridge/model,trust_remote_code=yes"),
    )
    _refused("search", "a red apple", "--bridge", "bridge", saying="BRIDGEKIT_TRUST_REMOTE_CODE=yes")
    assert not Path("owned").exists(), "the code was run"


def remote_code_in_a_model(ground: Ground) -> None:
    """Models with custom code, of transformers, timm and diffusers."""
    sides = ("encode", "--pairs", "pairs.csv", "--a")
    _own_code(Path("model"))
    _refused(*sides, "image", "--b", "transformers:./model", saying="does not run this model's own code")
    small: dict[str, Any] = {"architecture": "test_vit", "pretrained_cfg": {}}
    for name, config, saying in (
        ("unknown", {"architecture": "own", "module": "own", "auto_map": {"AutoModel": "own.Own"}}, "found no model 'own'"),
        ("layer", {**small, "model_args": {"act_layer": "own.Own"}}, "timm cannot build or load"),
        ("pickle", small, "timm cannot build or load"),
    ):
        _code_folder(Path(name), "config.json", config)
        torch.save(_Runs(), f"{name}/pytorch_model.bin")
        _refused(*sides, f"timm:./{name}", "--b", "text", saying=saying)
    parts = {"unet": ["diffusers", "UNet2DModel"]}
    for name, index in (
        ("class", {"_class_name": ["own", "Own"], **parts}),
        ("part", {"_class_name": "DDPMPipeline", "unet": ["own", "Own"]}),
        ("file", {"_class_name": "DDPMPipeline", **parts}),
    ):
        _code_folder(Path(name), "model_index.json", index)
        shutil.copyfile(f"{name}/own.py", f"{name}/unet/own.py")
        _refused(
            "generate", "--text", "a red apple", "--bridge", "bridge", "--model", f"./{name}", saying=",trust_remote_code=yes"
        )
    shutil.copyfile("part/own.py", "own.py")
    for file in Path("part").rglob("*.py"):
        file.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(".")  # as `python -m bridgekit` has it
        _refused(
            "generate", "--text", "a red apple", "--bridge", "bridge", "--model", "./part", saying=",trust_remote_code=yes"
        )
    assert not Path("owned").exists(), "the code was run"


def _own_code(folder: Path) -> None:
    auto = {"AutoConfig": "own.Own", "AutoModel": "own.Own"}
    _code_folder(folder, "config.json", {"model_type": "of-its-own", "auto_map": auto})


def _code_folder(folder: Path, file: str, config: dict[str, Any]) -> None:
    (folder / "unet").mkdir(parents=True)
    (folder / file).write_text(json.dumps(config))
    (folder / "own.py").write_text("open('owned', 'w').write('x')")


def model_that_a_bridge_would_download(ground: Ground) -> None:
    """A bridge that names models of the hub, which would be downloaded without asking the user."""
    for side, name in (
        ("text", "transformers:someone/model"),
        ("text", "transformers:someone/model@main,pooling=mean"),
        ("text", "concat:starter:text+transformers:someone/model"),
        ("image", "timm:someone/model"),
        ("image", "timm:hf-hub:someone/model"),
        ("image", "timm:resnet18.a1_in1k"),
        ("image", "timm:resnet18.a1_in1k,layers=2+last"),
    ):
        _rewrite(Path("bridge"), lambda metadata, side=side, name=name: metadata["sides"][side].update(encoder=name))  # type: ignore[misc]
        with _network() as addresses:
            ended = _refused("eval", "bridge", "--pairs", "pairs.csv", saying="BRIDGEKIT_OUTSIDE=yes, or run: hf download ")
            assert not addresses, f"{name} was looked for at {addresses[0]}"
        assert "--revision main" in ended.err or "@main" not in name
        with _network() as addresses, inside(Path(), BRIDGEKIT_OUTSIDE="yes"):
            _refused("eval", "bridge", "--pairs", "pairs.csv", saying="cannot fetch this model")
            assert addresses, f"the user may allow {name}"
        _rewrite(Path("bridge"), lambda metadata, side=side: metadata["sides"][side].update(encoder=f"starter:{side}"))  # type: ignore[misc]


@contextlib.contextmanager
def _network() -> Iterator[list[str]]:
    """As if there were a network; every host that is looked up is listed, and none is found."""
    looked_up: list[str] = []

    def look_up(host: Any, *_: Any, **__: Any) -> Any:
        looked_up.append(str(host))
        raise socket.gaierror("there is no network here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        patch.setattr(socket, "getaddrinfo", look_up)
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
            patch.delenv(name, raising=False)
        yield looked_up


def plugin_that_is_not_installed(ground: Ground) -> None:
    """A bridge that names a plugin that is not installed: nothing is installed or downloaded."""
    _rewrite(Path("bridge"), lambda metadata: metadata["sides"]["text"].update(encoder="bridgekit-evil:model"))
    started: list[str] = []
    watching = [True]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect"):
            started.append(f"{event} {arguments[:2]}")

    sys.addaudithook(watch)  # audit hooks cannot be removed
    try:
        ended = _refused("search", "a red apple", "--bridge", "bridge", saying="no installed plugin provides 'bridgekit-evil'")
    finally:
        watching.clear()
    assert not started, f"it started {started[0]}"
    assert "pip install" not in ended.err, "a stranger's package must not be recommended"


# ---- paths


def absolute_path_in_a_table(ground: Ground) -> None:
    """An absolute path in a table that leads out of its folder."""
    shutil.copyfile("pictures/0.png", "../away.png")
    _table(ground, str(Path("../away.png").resolve()))
    assert "leads outside the table's folder" in _set_aside(1)[0]
    assert not _set_aside(0, "--outside"), "the user may allow it"


def dots_in_a_table(ground: Ground) -> None:
    """A path with .. in a table that leads out of its folder."""
    shutil.copyfile("pictures/0.png", "../away.png")
    _table(ground, "../away.png", "pictures/../../away.png", "pictures/../pictures/1.png")
    assert len([reason for reason in _set_aside(2) if "leads out" in reason]) == 2


def link_in_a_table(ground: Ground) -> None:
    """Symlinks next to a table that lead out of its folder: a file and a folder."""
    shutil.copytree("pictures", "../away")
    Path("one.png").symlink_to("../away/0.png")
    Path("all").symlink_to("../away")
    Path("within.png").symlink_to("pictures/1.png")
    _table(ground, "one.png", "all/2.png", "within.png")
    assert len([reason for reason in _set_aside(2) if "leads out" in reason]) == 2


def link_among_class_folders(ground: Ground) -> None:
    """A class folder that is a symlink to another place."""
    shutil.copytree("pictures", "../away")
    shutil.copytree("pictures", "classes/inside")
    Path("classes/away").symlink_to(Path("../away").resolve())
    result = _result("encode", "--pairs", "classes", "--a", "image", "--b", "text")
    assert len(result["set_aside"]) == len(list(Path("../away").iterdir()))


def table_named_by_a_bridge(ground: Ground) -> None:
    """A bridge that names another user's table as its own."""
    shutil.copytree(".", "../private")
    for path in (str(Path("../private/pairs.csv").resolve()), "../private/pairs.csv"):
        _rewrite(Path("bridge"), lambda metadata, path=path: metadata["provenance"].update(pairs=path))  # type: ignore[misc]
        _refused("eval", "bridge", saying="../private/pairs.csv" if path.startswith("..") else "private/pairs.csv")
        _refused("search", "a red apple", "--bridge", "bridge", saying="--among")
    Path("linked.csv").symlink_to("../private/pairs.csv")
    _rewrite(Path("bridge"), lambda metadata: metadata["provenance"].update(pairs="linked.csv"))
    _refused("eval", "bridge", saying="linked.csv")


def encoder_path_in_a_bridge(ground: Ground) -> None:
    """A bridge that names a local model of the user's as its encoder."""
    Path("../model").mkdir()
    for name in (f"timm:{Path('../model').resolve()}", "timm:../model", "timm:local-dir:../model", "transformers:~"):
        _rewrite(Path("bridge"), lambda metadata, name=name: metadata["sides"]["image"].update(encoder=name))  # type: ignore[misc]
        _refused("eval", "bridge", "--pairs", "pairs.csv", saying="BRIDGEKIT_OUTSIDE=yes")


def link_to_a_secret_in_a_bridge(ground: Ground) -> None:
    """A bridge with a symlink to a secret, which would be copied into a bridge that is shared later."""
    Path("bridge/secret.png").symlink_to(Path("../secret.txt").resolve())
    _refused("bind", "bridge", "--add", "image", "--pairs", "pairs.csv", "--out", "larger", saying="secret.png")
    assert not Path("larger").exists(), "the secret was copied"


def link_to_write_through_in_a_bridge(ground: Ground) -> None:
    """A bridge whose folder of conditioners is a symlink to another place, so that files are written there."""
    Path("../elsewhere").mkdir()
    Path("bridge/conditioners").symlink_to(Path("../elsewhere").resolve())
    _refused("generate", "--image", "pictures/0.png", "--bridge", "bridge", saying="conditioners")
    assert not list(Path("../elsewhere").iterdir()), "it was written into"


def lock_that_is_a_link(ground: Ground) -> None:
    """Symlinks to a file of the user's where the commands that write a folder make its lock, and other things there."""
    secret = Path("../secret.txt")
    verbs: dict[str, tuple[object, ...]] = {
        "bridges/.image-text.lock": ("align", "--pairs", "pairs.csv", "--a", "image", "--b", "text", "--device", "cpu"),
        ".bridge.lock": ("bind", "bridge", "--add", "image", "--pairs", "pairs.csv", "--overwrite"),
        ".bridgekit-mine.lock": ("plugins", "new", "mine", "--modality", "text"),
        "models/.whisper.lock": ("starter-export", "whisper-base", "models/whisper"),
    }
    for name, arguments in verbs.items():
        lock = Path(name)
        lock.parent.mkdir(exist_ok=True)
        lock.symlink_to(os.path.relpath(secret, lock.parent))
        _refused_in_words(name, "is a link", *arguments)
        lock.unlink()
        lock.hardlink_to(secret)
        _refused_in_words(name, "hard link", *arguments)
        lock.unlink()
        os.mkfifo(lock)
        _refused_in_words(name, "not a regular file", *arguments)
        lock.unlink()
        lock.mkdir()
        _refused_in_words(name, "not a regular file", *arguments)
        lock.rmdir()
        assert secret.read_text() == "a secret", f"{arguments[0]} wrote through the lock"
    assert not Path("bridges/image-text").exists()
    assert not Path("bridgekit-mine").exists()


def _refused_in_words(where: str, saying: str, *arguments: object) -> None:
    """`_refused` for verbs without `--json`: the message must name this place and have a remedy."""
    ended = call(arguments)
    assert not ended.crash, ended.crash
    assert ended.code == 2, f"`{' '.join(map(str, arguments))}` ended with {ended.code}"
    what, place, remedy = ended.err[ended.err.find("bridgekit: ") :].splitlines()
    assert saying in what, ended.err
    assert place.endswith(where), ended.err
    assert remedy.startswith("  fix: "), ended.err


def modality_that_is_a_path(ground: Ground) -> None:
    """A bridge with a modality named ../../x, which would be used in file names."""

    def change(metadata: dict[str, Any]) -> None:
        metadata["sides"]["../../x"] = metadata["sides"].pop("image")

    _rewrite(Path("bridge"), change)
    _refused("info", "bridge", saying="the name of a modality")


# ---- sizes


def shapes_that_claim_terabytes(ground: Ground) -> None:
    """A bridge that claims terabytes of adapters, with a matching preset."""

    def change(metadata: dict[str, Any]) -> None:
        metadata["sides"]["text"]["dim"] = 65_536
        metadata["preset"] |= {"blocks": 64, "expansion": 64.0}

    _rewrite(Path("bridge"), change)
    _refused("info", "bridge", saying="adapters.safetensors")


def list_of_tensors_that_lies(ground: Ground) -> None:
    """Safetensors headers with a length of a petabyte, offsets beyond the file, and huge or negative shapes."""
    bridge = Path("bridge")
    data = (bridge / "adapters.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    listed = json.loads(data[8 : 8 + length])
    name = next(name for name in listed if name != "__metadata__")
    lies = [(1 << 50).to_bytes(8, "little") + data[8:]]
    for change in ({"data_offsets": [0, 1 << 50]}, {"shape": [1 << 31, 1 << 31]}, {"shape": [-1]}):
        text = json.dumps({**listed, name: {**listed[name], **change}}).encode()
        lies.append(len(text).to_bytes(8, "little") + text + data[8 + length :])
    for lie in lies:
        _sign(bridge, lie)
        _refused("info", "bridge", saying="adapters.safetensors cannot be used")


def files_of_100_gigabytes(ground: Ground) -> None:
    """Sparse files of 100 GB in a bridge."""
    for name in ("training_rows.safetensors", "history.jsonl", "adapters.safetensors", "bridge.json"):
        os.truncate(f"bridge/{name}", 100 << 30)
        _refused("info", "bridge", saying=name)


def consistent_lie_in_a_sparse_file(ground: Ground) -> None:
    """A bridge whose fields, list of tensors, checksum and file of 2 GB agree, but the file is a hole."""
    from tests.test_bounds import wide_bridge

    wide = wide_bridge(Path("wide"), 8_192, ())
    file = wide / "adapters.safetensors"
    assert file.stat().st_size > 2_000_000_000 > 51_200 * file.stat().st_blocks, "it must be large, and a hole"
    _refused("info", "wide", saying="adapters.safetensors")


def pipes_and_devices(ground: Ground) -> None:
    """Named pipes and endless devices instead of a bridge's files, a table, or a table's items."""
    os.mkfifo("pipe.png")
    Path("zero.png").symlink_to("/dev/zero")
    _table(ground, "pipe.png", "zero.png")
    for reason in _set_aside(2, "--outside"):  # otherwise the link is refused by where it leads
        assert "not a regular file" in reason, reason
    for name in ("pipe.csv", "pipe.jsonl", "pipe.parquet"):
        os.mkfifo(name)
        _refused("encode", "--pairs", name, saying="not a regular file")
    Path("bridge/history.jsonl").unlink()
    os.mkfifo("bridge/history.jsonl")
    _refused("info", "bridge", saying="history.jsonl")
    Path("bridge/adapters.safetensors").unlink()
    Path("bridge/adapters.safetensors").symlink_to("/dev/zero")
    _refused("info", "bridge", saying="adapters.safetensors")


def deep_json(ground: Ground) -> None:
    """JSON nested 100,000 levels deep in a bridge, its history, and a row of a table."""
    deep = "[" * 100_000
    Path("rows.jsonl").write_text('{"image": "pictures/0.png", "text": ' + deep)
    _refused("encode", "--pairs", "rows.jsonl", saying="row 1")
    Path("bridge/history.jsonl").write_text(deep)
    _refused("info", "bridge", saying="history.jsonl")
    Path("bridge/bridge.json").write_text('{"format":' * 100_000)
    _refused("info", "bridge", saying="nested")


def keys_that_multiply(ground: Ground) -> None:
    """A JSONL table in which every row has another key, so that n rows would give n columns of n cells."""
    rows = [{"image": "pictures/0.png", "text": f"row {at}", f"key {at}": at} for at in range(30_000)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ended = call(["search", "a red apple", "--bridge", "bridge", "--among", "rows.jsonl", "--to", "image", "--json"])
    assert not fault(ended), fault(ended)


def conditioner_that_claims_terabytes(ground: Ground) -> None:
    """A small conditioner that claims a conditioning of terabytes."""
    from safetensors.torch import save_file

    from bridgekit.diffusion.conditioner import load_conditioner

    metadata = {"format": 1, "kind": "x", "made_of": "text", "scale": 1.0, "cosine": 1.0, "masks": []}
    tensors = {"embeddings": torch.zeros(1, 65_536), "items": torch.tensor(list(b'["a"]'), dtype=torch.uint8)}
    for shapes in ({"x": [65_536, 65_536]}, {"x": [1 << 40]}, {f"x{at}": [65_536, 65_536] for at in range(1_000)}):
        save_file(tensors, "claims.safetensors", {"conditioner": json.dumps({**metadata, "shapes": shapes})})
        assert load_conditioner(Path("claims.safetensors")) is None


def zlib_bomb_in_a_picture(ground: Ground) -> None:
    """An image with text chunks that decompress to a gigabyte each."""
    pack = zlib.compressobj(9)
    bomb = b"".join([*(pack.compress(bytes(1 << 24)) for _ in range(64)), pack.flush()])
    Image.new("RGB", (32, 32)).save("bomb.png")
    data = Path("bomb.png").read_bytes()
    chunks = b"".join(
        _chunk(kind, body)
        for kind, body in (
            (b"zTXt", b"Comment\0\0" + bomb),
            (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + bomb),
            (b"iCCP", b"icc\0\0" + bomb),
        )
    )
    Path("bomb.png").write_bytes(data[:33] + chunks + data[33:])
    _table(ground, "bomb.png")
    ended = call(["encode", "--pairs", "pairs.csv", "--a", "image", "--b", "text", "--json"])
    assert not fault(ended), fault(ended)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


# ---- false numbers and names


def zip_bomb_in_a_checkpoint(ground: Ground) -> None:
    """A checkpoint of a few megabytes that decompresses to gigabytes."""
    torch.save({"state_dict": {"x": torch.zeros(1 << 26)}}, "plain.pth")
    with zipfile.ZipFile("plain.pth") as whole, zipfile.ZipFile("bomb.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for part in whole.infolist():
            packed.writestr(part.filename, whole.read(part))
    Path("plain.pth").unlink()
    _refused("encode", "--pairs", "pairs.csv", "--a", "timm:test_vit,checkpoint=bomb.pth", "--b", "text", saying="compressed")


def numbers_that_are_not_finite(ground: Ground) -> None:
    """Adapters with NaN and a correct checksum, and invalid temperatures."""
    data = bytearray(Path("bridge/adapters.safetensors").read_bytes())
    data[-4:] = b"\0\0\xc0\x7f"
    before = Path("bridge/adapters.safetensors").read_bytes()
    _sign(Path("bridge"), bytes(data))
    _refused("info", "bridge", saying="not finite")
    _sign(Path("bridge"), before)
    for temperature in (0, -1, 1e300, 10**38, float("nan"), "0.07"):
        _rewrite(Path("bridge"), lambda metadata, value=temperature: metadata.update(temperature=value))  # type: ignore[misc]
        _refused("info", "bridge", saying="bridge.json")


def width_that_lies(ground: Ground) -> None:
    """A bridge that states a wrong width or modality for an encoder."""

    def swap(metadata: dict[str, Any]) -> None:
        sides = metadata["sides"]
        sides["image"], sides["text"] = (
            {**sides["text"], "dim": sides["image"]["dim"]},
            {**sides["image"], "dim": sides["text"]["dim"]},
        )

    _rewrite(Path("bridge"), swap)
    _refused("embed", "a red apple", "--modality", "text", "--bridge", "bridge", saying="is not the encoder that")


def key_twice(ground: Ground) -> None:
    """A bridge.json with a duplicate key, which different parsers read differently."""
    text = Path("bridge/bridge.json").read_text(encoding="utf-8")
    Path("bridge/bridge.json").write_text(text.rstrip()[:-1] + ', "temperature": 0.5}', encoding="utf-8")
    _refused("info", "bridge", saying="twice")


def escape_sequences_in_a_bridge(ground: Ground) -> None:
    """Escape sequences and right-to-left overrides in a bridge's metadata."""
    evil = "\x1b]0;owned\x07\x9b2J\u202egnp[/red]"

    def change(metadata: dict[str, Any]) -> None:
        metadata["provenance"] |= {"command": evil, "machine": evil, evil: evil, "rows": {evil: 3}}
        for record in metadata["metrics"]:
            record |= {"split": evil, "method": evil}

    _rewrite(Path("bridge"), change)
    assert "\\x1b]0;owned\\x07" in _shown("info", "bridge")
    _shown("search", "a red apple", "--bridge", "bridge")
    _rewrite(Path("bridge"), lambda metadata: metadata["sides"]["text"].update(encoder=f"starter:{evil}"))
    _shown("info", "bridge")


def escape_sequences_in_a_table(ground: Ground) -> None:
    """Escape sequences, markup and right-to-left overrides in a table's cells and in file names."""
    evil = "\x1b[2J\x1b]0;owned\x07\u202e[/red]"
    # Rotated, so that it is not a training image.
    Image.open("pictures/0.png").transpose(Image.Transpose.ROTATE_180).save(f"{evil[:5]}.png")
    Path("empty\x1b[31m.png").touch()
    rows = [(f"{evil[:5]}.png", evil, evil), ("empty\x1b[31m.png", "x", "test"), (f"gone{evil}.png", "y", "test")]
    write_csv(Path("pairs.csv"), [("image", "text", "split"), *rows, *ground.rows])
    assert "2 rows were set aside" in _shown("encode", "--pairs", "pairs.csv", "--a", "image", "--b", "text")
    _shown("search", "a red apple", "--bridge", "bridge", "--among", "pairs.csv", "--to", "text", "-k", 20)
    _shown("search", "a red apple", "--bridge", "bridge", "--among", "pairs.csv", "--to", "image", "-k", 20)
    assert "\\x1b" in _shown("eval", "bridge", "--pairs", "pairs.csv", "--unseen")
    _shown("subset", "--pairs", "pairs.csv", "-k", 3, "--strict")
    # Captions in two splits, which `check` lists, and splits of these names.
    clipboard = "\x1b]52;c;b3duZWQ=\x07\u202e[/red]"
    twice = [(f"pictures/{at}.png", clipboard, split) for at, split in enumerate(("train", f"te{clipboard}st", "test"))]
    write_csv(Path("twice.csv"), [("image", "text", "split"), *twice, *ground.rows])
    assert "\\x1b]52" in _shown("check", "twice.csv")
    _shown("index", "twice.csv", "--bridge", "bridge", "--out", "made.index")
    _shown("search", "a red apple", "--bridge", "bridge", "--index", "made.index", "-k", 20)


def markup_in_a_model_card(ground: Ground) -> None:
    """HTML and Markdown in a bridge's metadata, which go into its model card."""
    from bridgekit import Bridge

    evil = "<img src=x onerror=alert(1)>](http://evil) `|` ![x](http://evil)\n# owned"

    def change(metadata: dict[str, Any]) -> None:
        metadata["provenance"] |= {"pairs": evil, "command": evil, evil: evil}
        metadata["metrics"][0] |= {"split": evil, "method": evil}

    _rewrite(Path("bridge"), change)
    card = (Bridge.load("bridge").save("a ]( <b> bridge") / "README.md").read_text(encoding="utf-8").partition("```")[0]
    for mark in ("<img", "<b>", "](http://evil", "\n# owned"):
        assert mark not in card, f"the model card has {mark!r}"


# ---- models


def hub_model_that_moved(ground: Ground) -> None:
    """A Hub model whose main branch changes to other weights after a bridge was trained on it."""
    import timm
    from timm.models import save_for_hf

    repository = Path("hub/models--someone--small").resolve()
    (repository / "refs").mkdir(parents=True)
    for seed, commit in enumerate((COMMIT, "f" * 40)):
        torch.manual_seed(seed)
        save_for_hf(timm.create_model("test_vit"), str(repository / "snapshots" / commit))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(repository.parent))
        (repository / "refs" / "main").write_text(COMMIT)
        from bridgekit import PRESETS

        for field, value in {"epochs": 1, "batch_size": 8, "shared_dim": 16}.items():
            patch.setitem(PRESETS, "default", type(PRESETS["default"])(**{**vars(PRESETS["default"]), field: value}))
        _result("align", "--a", "timm:someone/small", "--b", "text", "--pairs", "pairs.csv", "--out", "pinned")
        recorded = _result("info", "pinned")["sides"]["image"]["encoder"]
        assert recorded == f"timm:someone/small@{COMMIT}", f"the bridge records {recorded}"
        (repository / "refs" / "main").write_text("f" * 40)
        _result("eval", "pinned", "--pairs", "pairs.csv")
        _rewrite(Path("pinned"), lambda metadata: metadata["sides"]["image"].update(encoder="timm:someone/small"))
        _refused("eval", "pinned", "--pairs", "pairs.csv", saying="is not the encoder that this bridge was trained on")


def flipped_bit_in_starter_weights(ground: Ground) -> None:
    """Starter weights with one bit flipped."""
    from bridgekit_starter.weights import MINILM_TOKENIZER

    from bridgekit.errors import PluginError

    real = MINILM_TOKENIZER.locate()
    copied = Path("packages") / MINILM_TOKENIZER.path
    copied.parent.mkdir(parents=True)
    data = bytearray(real.read_bytes())
    assert MINILM_TOKENIZER.read() == data
    data[len(data) // 2] ^= 1
    copied.write_bytes(data)
    facts = Path("packages") / f"{MINILM_TOKENIZER.package.replace('-', '_')}-{MINILM_TOKENIZER.version}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {MINILM_TOKENIZER.package}\nVersion: 0.1.0\n")
    sys.path.insert(0, str(Path("packages").resolve()))
    try:
        assert MINILM_TOKENIZER.locate().resolve() == copied.resolve()
        with pytest.raises(PluginError, match="SHA-256"):
            MINILM_TOKENIZER.read()
    finally:
        sys.path.pop(0)


def link_in_the_place_of_a_bridge(ground: Ground) -> None:
    """A bridge that is a symlink to itself; a symlink to a real bridge works."""
    Path("loop").symlink_to("loop")
    _refused("info", "loop")
    Path("linked").symlink_to("bridge")
    assert _result("info", "linked")["sides"]


ATTACKS: tuple[Attack, ...] = (
    pickle_in_a_checkpoint,
    pickle_in_a_bridge,
    remote_code_in_a_bridge,
    remote_code_in_a_model,
    model_that_a_bridge_would_download,
    plugin_that_is_not_installed,
    absolute_path_in_a_table,
    dots_in_a_table,
    link_in_a_table,
    link_among_class_folders,
    table_named_by_a_bridge,
    encoder_path_in_a_bridge,
    link_to_a_secret_in_a_bridge,
    link_to_write_through_in_a_bridge,
    lock_that_is_a_link,
    modality_that_is_a_path,
    shapes_that_claim_terabytes,
    list_of_tensors_that_lies,
    files_of_100_gigabytes,
    consistent_lie_in_a_sparse_file,
    pipes_and_devices,
    deep_json,
    keys_that_multiply,
    conditioner_that_claims_terabytes,
    zlib_bomb_in_a_picture,
    zip_bomb_in_a_checkpoint,
    numbers_that_are_not_finite,
    width_that_lies,
    key_twice,
    escape_sequences_in_a_bridge,
    escape_sequences_in_a_table,
    markup_in_a_model_card,
    hub_model_that_moved,
    flipped_bit_in_starter_weights,
    link_in_the_place_of_a_bridge,
)
