"""What a repository in sentence-transformers' layout says of itself: pooling, layers behind it, prompts, longest text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bridgekit_transformers.families import POOLINGS
from bridgekit_transformers.loading import Source, read_json

#: The keys of older pooling configs, in the order in which the vectors of several poolings are joined.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS = {
    "Identity": nn.Identity,
    "Tanh": nn.Tanh,
    "GELU": nn.GELU,
    "ReLU": nn.ReLU,
    "Sigmoid": nn.Sigmoid,
    "SiLU": nn.SiLU,
}


class Unit(nn.Module):
    """Scales rows to length 1."""

    def forward(self, x: Tensor) -> Tensor:
        """Vectors of shape (n, d) into vectors of length 1."""
        return nn.functional.normalize(x, dim=-1)


@dataclass(frozen=True)
class Layout:
    """What stands in the files.

    Arguments:
        poolings: names of poolings whose vectors are joined; none where the repository does not say.
        behind: what a pooled vector goes through.
        tokens: the most tokens of a text that are read, or None.
        lower: whether texts are made lower case first.
        prompts: texts to put before a text, by name.
        default_prompt: the name of the prompt that is used unless another is requested.
    """

    poolings: tuple[str, ...] = ()
    behind: tuple[nn.Module, ...] = ()
    tokens: int | None = None
    lower: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None

    def describe(self) -> list[str]:
        """The layers behind the pooling, for a revision."""
        return ["unit" if isinstance(layer, Unit) else type(layer).__name__.lower() for layer in self.behind]


def read_layout(source: Source) -> Layout:
    """The layout of a text model's repository: an empty one where it has no files of sentence-transformers.

    Raises:
        PluginError: the repository asks for something that this plugin does not do.
    """
    modules = read_json(source.folder / "modules.json") or []
    poolings: tuple[str, ...] = ()
    behind: list[nn.Module] = []
    for place, module in enumerate(modules):
        package, kind = str(module["type"]).partition(".")[0], str(module["type"]).rpartition(".")[2]
        folder = source.folder / module["path"]
        if package != "sentence_transformers":
            raise source.error(f"does not take sentence models with modules of their own ({module['type']} in modules.json)")
        if place == 0 and kind == "Transformer" and not module["path"]:
            continue
        if kind == "Pooling" and not poolings and not behind:
            poolings = _poolings(source, read_json(folder / "config.json") or {})
        elif kind == "Dense" and poolings:
            behind += _dense(source, folder)
        elif kind == "Normalize" and poolings:
            behind.append(Unit())
        else:
            where = f" in {module['path']}" if module["path"] else ""
            raise source.error(
                f"does not know what to do with the module {kind}{where} that modules.json names at place {place}",
                "it takes a Transformer at the top, Pooling, and then any of Dense and Normalize",
            )
    lengths = [read_json(file) for file in sorted(source.folder.glob("sentence_*_config.json"))]
    texts: dict[str, Any] = lengths[0] if lengths else {}
    whole = read_json(source.folder / "config_sentence_transformers.json") or {}
    return Layout(
        poolings=poolings,
        behind=tuple(layer.eval().to(source.device) for layer in behind),
        tokens=texts.get("max_seq_length"),
        lower=bool(texts.get("do_lower_case")),
        prompts=whole.get("prompts") or {},
        default_prompt=whole.get("default_prompt_name"),
    )


def _poolings(source: Source, config: Mapping[str, Any]) -> tuple[str, ...]:
    if config.get("include_prompt", True) is False:
        raise source.error("does not do a pooling that leaves the prompt's tokens out (include_prompt: false)")
    mode = config.get("pooling_mode") or [name for flag, name in _FLAGS.items() if config.get(flag)] or "mean"
    names = (mode,) if isinstance(mode, str) else tuple(mode)
    unknown = [name for name in names if name not in POOLINGS]
    if unknown:
        raise source.error(f"does not know the pooling {unknown[0]!r}", f"it knows {', '.join(POOLINGS)}")
    return names


def _dense(source: Source, folder: Path) -> list[nn.Module]:
    config = read_json(folder / "config.json")
    activation = str(config.get("activation_function", "Tanh")).rpartition(".")[2] if config else ""
    if activation not in _ACTIVATIONS:
        raise source.error(f"cannot do the layer in {folder.name}: its activation is {activation or 'not told'}")
    if (folder / "model.safetensors").is_file():
        weights = load_file(folder / "model.safetensors")
    elif (folder / "pytorch_model.bin").is_file():
        weights = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    else:
        raise source.error(f"finds no weights in {folder}", "download the model again")
    linear = nn.Linear(config["in_features"], config["out_features"], bias=config.get("bias", True))
    try:
        linear.load_state_dict({name.removeprefix("linear."): weight.float() for name, weight in weights.items()})
    except RuntimeError as error:
        raise source.error(f"cannot load the weights in {folder}: {' '.join(str(error).split())[:200]}") from error
    return [linear, _ACTIVATIONS[activation]()]
