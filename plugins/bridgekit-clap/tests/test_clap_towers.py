"""laion_clap is imported without its downloads, and nothing stays patched afterwards."""

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bridgekit_clap.towers import _replaced, build_tower, import_laion_clap
from transformers import BartTokenizer, BertTokenizer, RobertaModel, RobertaTokenizer

from bridgekit.errors import PluginError

# No offline mode here: a connection that is only tried would be seen.
WITHOUT_A_NETWORK = """
import os, socket, sys
os.environ.pop("HF_HUB_OFFLINE", None)
tried = []
def refuse(*where):
    tried.append(where)
    raise OSError("no network")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
from transformers import BartTokenizer, BertTokenizer, RobertaModel, RobertaTokenizer
kinds = (BartTokenizer, BertTokenizer, RobertaModel, RobertaTokenizer)
before = [kind.from_pretrained for kind in kinds]
path = list(sys.path)
"""


def run(code: str, *arguments: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", WITHOUT_A_NETWORK + code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout.splitlines()


def test_the_audio_tower_opens_without_a_network_and_leaves_no_patch_behind(released: Any, clip: Callable[..., Path]) -> None:
    said = run(
        """
from pathlib import Path
from typing import Any
from bridgekit import load_encoder
encoder = load_encoder(f"clap:{sys.argv[1]}", "cpu")
print(tuple(encoder.encode([encoder.prepare(Path(sys.argv[2]))]).shape), tried)
print(before == [kind.from_pretrained for kind in kinds], path == sys.path)
print([kind.__name__ for kind in kinds if "from_pretrained" in vars(kind)])
""",
        str(released.checkpoint),
        str(clip(1)),
    )
    assert said == ["(1, 512) []", "True True", "[]"]


@pytest.mark.usefixtures("released")
def test_if_laion_clap_does_not_import_one_message_says_so_and_no_patch_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(Path(str(sys.modules["laion_clap"].__file__)).parent)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(folder):
            monkeypatch.delitem(sys.modules, name)
        elif name.split(".")[0] == "torchlibrosa":
            monkeypatch.setitem(sys.modules, name, None)
    kinds = (BartTokenizer, BertTokenizer, RobertaModel, RobertaTokenizer)
    before, path = [kind.from_pretrained for kind in kinds], list(sys.path)
    with pytest.raises(PluginError) as caught:
        import_laion_clap()
    said = str(caught.value).splitlines()
    assert said[0].startswith("bridgekit-clap cannot import laion_clap (ModuleNotFoundError: ")
    assert said[1].startswith("  fix: pip install plugins/bridgekit-clap")
    assert [kind.from_pretrained for kind in kinds] == before
    assert sys.path == path


def test_laion_claps_own_tokenizers_are_made_when_they_are_first_used(released: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def make(name: str) -> Any:
        asked.append(name)
        return lambda text, **_: {"input_ids": torch.tensor([[len(text)]])}

    monkeypatch.setattr(RobertaTokenizer, "from_pretrained", make)
    data = import_laion_clap().training.data
    assert [data.tokenizer("a dog")["input_ids"].item() for _ in range(2)] == [5, 5]
    assert asked == ["roberta-base"]


class Parent:
    @classmethod
    def from_pretrained(cls, name: str) -> str:
        return f"{cls.__name__} {name}"


class Own(Parent):
    @classmethod
    def from_pretrained(cls, name: str) -> str:
        return f"own {name}"


class Child(Parent):
    pass


class Grandchild(Child):
    pass


def test_a_replacement_affects_only_its_thread_and_class_and_is_removed_even_after_an_error() -> None:
    seen: list[str] = []
    other = threading.Thread(target=lambda: seen.append(Child.from_pretrained("x")))

    def fail() -> None:
        with _replaced({Child: lambda name: "stand-in", Own: lambda name: "stand-in"}):
            seen.extend(kind.from_pretrained("x") for kind in (Child, Own, Parent, Grandchild))
            other.start()
            other.join()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == ["stand-in", "stand-in", "Parent x", "Grandchild x", "Child x"]
    assert (Child.from_pretrained("x"), Own.from_pretrained("x")) == ("Child x", "own x")
    assert "from_pretrained" not in vars(Child)


def test_a_weight_that_is_missing_unknown_or_of_another_shape_is_named(released: Any) -> None:
    weights = released.audio_weights()

    def refusal(changed: dict[str, torch.Tensor]) -> str:
        with pytest.raises(PluginError) as caught:
            build_tower("audio", changed, released.checkpoint)
        assert len(str(caught.value).splitlines()) <= 3
        return caught.value.what

    name = "audio_branch.layers.3.blocks.1.mlp.fc2.bias"
    assert f"{name} is missing" in refusal({key: weight for key, weight in weights.items() if key != name})
    assert "audio_branch.extra is unknown" in refusal({**weights, "audio_branch.extra": torch.zeros(1)})
    assert f"{name} has shape (7,) instead of (768,)" in refusal({**weights, name: torch.zeros(7)})
    assert "no CLAP model with an HTSAT audio branch" in refusal({"audio_model.audio_encoder.norm.weight": torch.zeros(768)})
