"""Imports laion_clap without its downloads, and builds one tower of its model with a checkpoint's weights and no others."""

from __future__ import annotations

import importlib
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bridgekit.errors import PluginError

#: The width of an audio branch's last norm tells which one it is.
ARCHITECTURES = {768: "HTSAT-tiny", 1024: "HTSAT-base", 2048: "HTSAT-large"}
#: How many tokens roberta-base knows.
VOCABULARY = 50_265

_one_at_a_time = threading.RLock()


def import_laion_clap() -> ModuleType:
    """`laion_clap`, imported without a network.

    At its import it makes three tokenizers from the hub, which these towers do not need (LAION-AI/CLAP issue 171). Here it gets
    stand-ins that make them at their first use. It also adds its own folder to `sys.path`, where packages called `training` and
    `evaluate` would then be found. Afterwards, `from_pretrained` and `sys.path` are what they were.

    Raises:
        PluginError: laion_clap, or a package that it needs, is not installed or does not work.
    """
    with _one_at_a_time:
        if "laion_clap" in sys.modules:
            return importlib.import_module("laion_clap")  # which waits for another thread that is still importing it
        try:
            from transformers import BartTokenizer, BertTokenizer, RobertaTokenizer

            tokenizers = {kind: _makes_later(kind) for kind in (BartTokenizer, BertTokenizer, RobertaTokenizer)}
            with _instead_of_the_hub(tokenizers), _same_path():
                return importlib.import_module("laion_clap")
        except Exception as error:
            raise PluginError(
                f"bridgekit-clap cannot import laion_clap ({type(error).__name__}: {' '.join(str(error).split())[:200]})",
                remedy="pip install plugins/bridgekit-clap (in bridgekit's own folder), in an environment of its own "
                "if others there need numpy 2",
            ) from error


def build_tower(modality: str, weights: Mapping[str, Tensor], checkpoint: Path) -> tuple[Any, dict[str, Any]]:
    """laion_clap's model with the branch and the projection of one modality, and its configuration.

    Arguments:
        modality: `audio` or `text`.
        weights: of the whole checkpoint, see `bridgekit_clap.checkpoints.read_weights`.
        checkpoint: their file, for messages.

    Raises:
        PluginError: the weights are not those of a CLAP with HTSAT and RoBERTa, or some of the tower's are missing.
    """
    laion_clap = import_laion_clap()
    from transformers import RobertaConfig, RobertaModel

    norm = weights.get("audio_branch.norm.weight")
    architecture = ARCHITECTURES.get(0 if norm is None else norm.numel())
    if architecture is None:
        raise PluginError(
            "bridgekit-clap finds no CLAP with an HTSAT audio branch in this file",
            where=str(checkpoint),
            remedy="give a checkpoint of LAION-CLAP as its authors publish it (audio_branch.*, text_branch.*)",
        )
    # Where roberta-base differs from transformers' defaults. Its weights are in the checkpoint.
    base = RobertaConfig(vocab_size=VOCABULARY, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)
    roberta = {RobertaModel: lambda *_, **__: RobertaModel(base)}
    with _one_at_a_time, _instead_of_the_hub(roberta), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's news about functions that laion_clap calls
        # For audio, the text branch is to be thrown away: `transformer` is one that is quickly made.
        model, config = laion_clap.hook.create_model(architecture, "roberta" if modality == "text" else "transformer")
    kept = (f"{modality}_branch", f"{modality}_projection")
    for name, _ in list(model.named_children()):
        if name not in kept:
            delattr(model, name)
    for name in kept:
        _fill(getattr(model, name), f"{name}.", weights, checkpoint)
    return model.eval(), config


def _fill(module: torch.nn.Module, prefix: str, weights: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Give a module the weights whose names begin with a prefix: all that it has, and no others."""
    found = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    expected = module.state_dict()
    wrong = [
        *(f"{prefix}{name} is missing" for name in expected if name not in found),
        *(f"{prefix}{name} is not known" for name in found if name not in expected),
        *(
            f"{prefix}{name} has the shape {tuple(found[name].shape)} and not {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in found and found[name].shape != tensor.shape
        ),
    ]
    if wrong:
        more = f", and {len(wrong) - 1} more such" if len(wrong) > 1 else ""
        raise PluginError(
            f"bridgekit-clap finds other weights than laion_clap's model has: {wrong[0]}{more}",
            where=str(checkpoint),
            remedy="give a checkpoint of LAION-CLAP with HTSAT and RoBERTa, whole",
        )
    module.load_state_dict(found)


class _Later:
    """A tokenizer that is made at its first use."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = cache(make)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._make()(*args, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by whoever looks at all objects, not by whoever uses this one
            raise AttributeError(name)
        return getattr(self._make(), name)


def _makes_later(kind: Any) -> Callable[..., _Later]:
    return lambda *args, **options: _Later(lambda: kind.from_pretrained(*args, **options))


@contextmanager
def _instead_of_the_hub(stand_ins: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    """Classes of transformers whose `from_pretrained` is another function: for this thread, while the block runs."""
    thread = threading.get_ident()

    def stand_in(kind: Any, instead: Callable[..., Any]) -> Any:
        original = kind.from_pretrained.__func__

        def from_pretrained(cls: Any, *args: Any, **options: Any) -> Any:
            ours = cls is kind and threading.get_ident() == thread
            return instead(*args, **options) if ours else original(cls, *args, **options)

        return classmethod(from_pretrained)

    own = {kind: vars(kind).get("from_pretrained") for kind in stand_ins}
    for kind, instead in stand_ins.items():
        kind.from_pretrained = stand_in(kind, instead)
    try:
        yield
    finally:
        for kind, before in own.items():
            if before is None:  # it was, and is again, its parent's
                del kind.from_pretrained
            else:
                kind.from_pretrained = before


@contextmanager
def _same_path() -> Iterator[None]:
    before = set(sys.path)
    try:
        yield
    finally:
        sys.path[:] = [folder for folder in sys.path if folder in before]
