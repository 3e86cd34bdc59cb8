"""One shared space for two or more modalities, from frozen encoders and a few thousand pairs, on one machine.

    from bridgekit import align, Bridge, load_encoder

Names are imported on first use: `import bridgekit` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridgekit.bridge.bridge import Bridge as Bridge
    from bridgekit.encoders import Encoder as Encoder
    from bridgekit.errors import BridgekitError as BridgekitError
    from bridgekit.errors import ItemError as ItemError
    from bridgekit.fusion.training import PRESETS as PRESETS
    from bridgekit.fusion.training import Preset as Preset
    from bridgekit.hookspecs import EncoderProvider as EncoderProvider
    from bridgekit.hookspecs import ImageGenerator as ImageGenerator
    from bridgekit.hookspecs import PairProvider as PairProvider
    from bridgekit.hookspecs import PairSource as PairSource
    from bridgekit.hookspecs import hookimpl as hookimpl
    from bridgekit.items import Blob as Blob
    from bridgekit.pairs import Pairs as Pairs
    from bridgekit.plugins import load_encoder as load_encoder
    from bridgekit.recipes.align import align as align
    from bridgekit.recipes.bind import bind as bind
    from bridgekit.recipes.check import check_pairs as check_pairs
    from bridgekit.recipes.compare import compare as compare
    from bridgekit.recipes.generate import Input as Input
    from bridgekit.recipes.generate import generate as generate
    from bridgekit.recipes.judge import judge_generation as judge_generation
    from bridgekit.recipes.report import write_report as write_report
    from bridgekit.tables.reading import read_pairs as read_pairs

_HOME = {
    "align": "recipes.align",
    "bind": "recipes.bind",
    "Bridge": "bridge.bridge",
    "check_pairs": "recipes.check",
    "compare": "recipes.compare",
    "Input": "recipes.generate",
    "generate": "recipes.generate",
    "judge_generation": "recipes.judge",
    "Encoder": "encoders",
    "BridgekitError": "errors",
    "ItemError": "errors",
    "PRESETS": "fusion.training",
    "Preset": "fusion.training",
    "EncoderProvider": "hookspecs",
    "ImageGenerator": "hookspecs",
    "PairProvider": "hookspecs",
    "PairSource": "hookspecs",
    "hookimpl": "hookspecs",
    "Blob": "items",
    "Pairs": "pairs",
    "read_pairs": "tables.reading",
    "load_encoder": "plugins",
    "write_report": "recipes.report",
}
#: Names that are defined in one of our own plugins.
_FROM_PLUGINS = {
    "Index": "index",
    "Listing": "index",
    "list_items": "index",
    "choose_pairs": "subset",
    "choose_subset": "subset",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _FROM_PLUGINS:
        from bridgekit.plugins import ours

        return ours(_FROM_PLUGINS[name], name)
    if name not in _HOME:
        raise AttributeError(f"module 'bridgekit' has no attribute {name!r}")
    return getattr(import_module(f"bridgekit.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
