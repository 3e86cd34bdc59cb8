"""Importing laion_clap without its downloads, and building one tower of its model from a checkpoint."""

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

from bridgekit.errors import PluginError, one_line

#: Width of the audio branch's last norm to architecture.
ARCHITECTURES = {768: "HTSAT-tiny", 1024: "HTSAT-base", 2048: "HTSAT-large"}
#: Size of roberta-base's vocabulary.
VOCABULARY = 50_265

_one_at_a_time = threading.RLock()


def import_laion_clap() -> ModuleType:
    """Import `laion_clap` without a network.

    On import it loads three tokenizers from the hub that these towers do not need (LAION-AI/CLAP issue 171); here they are
    replaced by proxies that load on first use. It also adds its own folder to `sys.path`, which would expose packages named
    `training` and `evaluate`. Both `from_pretrained` and `sys.path` are restored afterwards.

    Raises:
        PluginError: laion_clap or one of its dependencies is not installed or does not work.
    """
    with _one_at_a_time:
        if "laion_clap" in sys.modules:
            return importlib.import_module("laion_clap")  # waits if another thread is still importing it
        try:
            from transformers import BartTokenizer, BertTokenizer, RobertaTokenizer

            tokenizers = {kind: _lazily(kind) for kind in (BartTokenizer, BertTokenizer, RobertaTokenizer)}
            with _replaced(tokenizers), _same_path():
                return importlib.import_module("laion_clap")
        except Exception as error:
            raise PluginError(
                f"bridgekit-clap cannot import laion_clap ({type(error).__name__}: {one_line(error)})",
                remedy="pip install plugins/bridgekit-clap (in bridgekit's own folder), in a separate environment "
                "if other packages need numpy 2",
            ) from error


def build_tower(modality: str, weights: Mapping[str, Tensor], checkpoint: Path) -> tuple[Any, dict[str, Any]]:
    """laion_clap's model with only the branch and projection of one modality, and its configuration.

    Arguments:
        modality: `audio` or `text`.
        weights: the whole checkpoint's weights, see `bridgekit_clap.checkpoints.read_weights`.
        checkpoint: their file, for messages.

    Raises:
        PluginError: the weights are not of a CLAP model with HTSAT and RoBERTa, or some of the tower's are missing.
    """
    laion_clap = import_laion_clap()
    from transformers import RobertaConfig, RobertaModel

    norm = weights.get("audio_branch.norm.weight")
    architecture = ARCHITECTURES.get(0 if norm is None else norm.numel())
    if architecture is None:
        raise PluginError(
            "bridgekit-clap found no CLAP model with an HTSAT audio branch in this file",
            where=str(checkpoint),
            remedy="give a LAION-CLAP checkpoint as published by its authors (audio_branch.*, text_branch.*)",
        )
    # roberta-base's differences from transformers' defaults. Its weights are in the checkpoint.
    base = RobertaConfig(vocab_size=VOCABULARY, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)
    roberta = {RobertaModel: lambda *_, **__: RobertaModel(base)}
    with _one_at_a_time, _replaced(roberta), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's deprecation warnings about laion_clap
        # For audio the text branch is discarded, so the one that is fastest to build is used.
        model, config = laion_clap.hook.create_model(architecture, "roberta" if modality == "text" else "transformer")
    kept = (f"{modality}_branch", f"{modality}_projection")
    for name, _ in list(model.named_children()):
        if name not in kept:
            delattr(model, name)
    for name in kept:
        _fill(getattr(model, name), f"{name}.", weights, checkpoint)
    return model.eval(), config


def _fill(module: torch.nn.Module, prefix: str, weights: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Load the weights with a prefix into a module; they must match exactly."""
    found = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    expected = module.state_dict()
    wrong = [
        *(f"{prefix}{name} is missing" for name in expected if name not in found),
        *(f"{prefix}{name} is unknown" for name in found if name not in expected),
        *(
            f"{prefix}{name} has shape {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in found and found[name].shape != tensor.shape
        ),
    ]
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise PluginError(
            f"bridgekit-clap found weights that do not match laion_clap's model: {wrong[0]}{more}",
            where=str(checkpoint),
            remedy="give a complete LAION-CLAP checkpoint with HTSAT and RoBERTa",
        )
    module.load_state_dict(found)


class _Lazy:
    """A tokenizer that is loaded on first use."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = cache(load)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._load()(*args, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # inspection of the object, not use of the tokenizer
            raise AttributeError(name)
        return getattr(self._load(), name)


def _lazily(kind: Any) -> Callable[..., _Lazy]:
    return lambda *args, **options: _Lazy(lambda: kind.from_pretrained(*args, **options))


@contextmanager
def _replaced(functions: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    """Replace `from_pretrained` of transformers classes, in this thread only, for the duration of the context."""
    thread = threading.get_ident()

    def replacement(kind: Any, function: Callable[..., Any]) -> Any:
        original = kind.from_pretrained.__func__

        def from_pretrained(cls: Any, *args: Any, **options: Any) -> Any:
            ours = cls is kind and threading.get_ident() == thread
            return function(*args, **options) if ours else original(cls, *args, **options)

        return classmethod(from_pretrained)

    own = {kind: vars(kind).get("from_pretrained") for kind in functions}
    for kind, function in functions.items():
        kind.from_pretrained = replacement(kind, function)
    try:
        yield
    finally:
        for kind, before in own.items():
            if before is None:  # inherited
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
