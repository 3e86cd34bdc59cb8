"""A CLAP with random weights in the published layout, a tokenizer, and clips: made here, once a session."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

# Where bridgekit-clap is not installed there is nothing to test.
collect_ignore = [] if find_spec("bridgekit_clap") else [path.name for path in Path(__file__).parent.glob("test_*.py")]


@dataclass(frozen=True)
class Released:
    """A checkpoint as LAION publishes it, and laion_clap's own module with the same weights."""

    module: Any
    checkpoint: Path
    tokenizer: Path

    def audio_weights(self) -> dict[str, Any]:
        """The audio tower's, without `module.`, as safetensors takes them."""
        weights = self.module.model.state_dict()
        return {name: weight.contiguous() for name, weight in weights.items() if name.startswith("audio_")}


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of roberta-base's kind with the vocabulary of single bytes and a few merges."""
    from tokenizers import pre_tokenizers

    folder = tmp_path_factory.mktemp("roberta-base")
    merges = [("d", "o"), ("do", "g"), ("Ġ", "b"), ("Ġb", "a"), ("Ġba", "r"), ("Ġbar", "k")]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in merges)]
    vocabulary = {token: place for place, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *tokens, "<mask>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Iterator[Released]:
    if find_spec("laion_clap") is None:  # asked without importing it
        pytest.skip("laion_clap, which needs numpy below 2, is not in this environment; make test has one for it, .venv-clap")
    import torch
    from bridgekit_clap.towers import import_laion_clap
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizer
    from transformers.initialization import no_init_weights

    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)
    tokenizer = RobertaTokenizer.from_pretrained(str(tokenizer_folder))
    torch.manual_seed(0)
    laion_clap = import_laion_clap()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(RobertaModel, "from_pretrained", lambda name: RobertaModel(config))
        patch.setattr(RobertaTokenizer, "from_pretrained", lambda name: tokenizer)
        module = laion_clap.CLAP_Module(enable_fusion=False, device="cpu").eval()
    weights = module.model.state_dict()
    for name, parameter in module.model.audio_branch.layers.named_parameters():
        if parameter.dim() > 1:
            weights[f"audio_branch.layers.{name}"] *= 3  # as initialised, a CLAP hears hardly any difference between two clips
    weights["audio_branch.bn0.running_mean"] += -30
    weights["audio_branch.bn0.running_var"] *= 400
    # Layers that share their numbers and rows that overlap are saved once: 150 MB instead of 630.
    for name in weights:
        if name.startswith("text_branch.encoder.layer."):
            weights[name] = weights[".".join(["text_branch.encoder.layer.0", *name.split(".")[4:]])]
    weights["text_branch.embeddings.word_embeddings.weight"] = torch.randn(50265 + 768).as_strided((50265, 768), (1, 1))
    module.model.load_state_dict(weights)
    saved = {
        "epoch": 45,
        "name": "best",
        "best_loss": np.float64(0.5),
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "state_dict": {
            **{f"module.{name}": weight for name, weight in weights.items()},
            "module.text_branch.embeddings.position_ids": torch.arange(514)[None],
        },
    }
    checkpoint = tmp_path_factory.mktemp("checkpoint") / "local-best.pt"
    torch.save(saved, checkpoint)
    # From here on, the checkpoint's weights replace the initial ones, and drawing those would take longer than the tests.
    with no_init_weights(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["clap_module.htsat"], "trunc_normal_", lambda weight, **_: weight)
        yield Released(module, checkpoint, tokenizer_folder)


@pytest.fixture
def clip(tmp_path: Path) -> Callable[..., Path]:
    """Makes a sound file: gliding harmonics and noise, other ones for each seed."""

    def make(seconds: float, seed: int = 0, *, rate: int = 48_000, channels: int = 1, subtype: str = "PCM_16") -> Path:
        time = np.arange(max(1, round(seconds * rate))) / rate
        random = np.random.default_rng(seed)
        pitch = 200 * (1 + random.random()) + 100 * np.sin(2 * np.pi * (0.3 + random.random()) * time)
        phase = 2 * np.pi * np.cumsum(pitch) / rate
        wave = 0.1 * sum(np.sin(k * phase) / k for k in range(1, 9)) + 0.05 * random.random() * random.standard_normal(
            len(time)
        )
        path = tmp_path / f"{seconds}-{seed}-{rate}-{channels}.wav"
        soundfile.write(path, np.stack([wave] * channels, axis=1), rate, subtype=subtype)
        return path

    return make
