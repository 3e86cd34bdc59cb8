"""`starter:openmoji-64`: a small text-to-image model that draws 64 x 64 images in the style of OpenMoji."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor
from torch.nn.functional import normalize

from bridgekit.encoders import Encoder
from bridgekit.errors import BridgekitError
from bridgekit.image_models import ImageModel
from bridgekit_starter.text import TextEncoder
from bridgekit_starter.tokens import TokenHead
from bridgekit_starter.weights import read_own

NAME = "starter:openmoji-64"
SIZE = 64
#: A diffusers folder, except that the text encoder is `head.safetensors` on top of the starter's MiniLM.
FOLDER = Path(__file__).parent / "openmoji-64"
#: Sampling steps and guidance scale (1 is none), chosen by pixel error on training names: see the model card.
STEPS, GUIDANCE = 2, 1.0
#: SHA-256 of each file, written by `training/openmoji64.py`.
HASHES = FOLDER / "sha256.json"


class SentenceConditioning:
    """MiniLM's sentence vectors, which the head turns into prompt embeddings.

    The conditioning is the vector, not the tokens, because a bridge whose text side is a frozen `starter:text` outputs it
    directly.
    """

    kind = "sentence"
    made_of = "text"

    def __init__(self, head: TokenHead, device: str) -> None:
        self.head = head.eval().to(device)
        self.device = device
        self._encoder: TextEncoder | None = None

    def encode(self, items: Sequence[Any]) -> dict[str, Tensor]:
        """n texts to `sentence`, (n, 384), unit length."""
        self._encoder = self._encoder or TextEncoder(self.device)
        prepared = [self._encoder.prepare(item) for item in items]
        order = sorted(range(len(prepared)), key=lambda row: len(prepared[row]))
        vectors = torch.empty(len(prepared), 384)
        for start in range(0, len(order), 64):
            rows = order[start : start + 64]
            vectors[rows] = self._encoder.encode([prepared[row] for row in rows])
        return {self.kind: vectors}

    def arguments(self, tensors: Mapping[str, Tensor], *, guided: bool, prompt: str | None = None) -> dict[str, Any]:
        """Prompt embeddings (n, 16, 128) and their mask; with guidance, those of a zero vector as negative prompt."""
        tokens = self._tokens(tensors[self.kind])
        mask = tokens.new_ones(tokens.shape[:2])
        arguments = {"negative_prompt": None, "prompt_embeds": tokens, "prompt_attention_mask": mask}
        if guided:
            nothing = self._tokens(torch.zeros(1, 384)).expand(len(tokens), -1, -1)
            arguments |= {"negative_prompt_embeds": nothing, "negative_prompt_attention_mask": mask}
        return arguments

    @torch.inference_mode()
    def _tokens(self, vectors: Tensor) -> Tensor:
        tokens: Tensor = self.head(normalize(vectors, dim=-1).to(self.device))
        return tokens

    def takes_latents_of(self, encoder: Encoder) -> bool:
        """Whether the encoder is the MiniLM that this model was trained on."""
        return encoder.revision == TextEncoder.revision


def open_generator(device: str) -> ImageModel:
    """The model in diffusers' `PixArtAlphaPipeline` without a text encoder: it takes `prompt_embeds`.

    Raises:
        BridgekitError: diffusers is not installed.
        PluginError: a file is missing or not the expected one.
    """
    try:
        from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
    except ImportError as error:
        raise BridgekitError(
            "generating images needs diffusers", remedy="pip install accelerate diffusers transformers"
        ) from error
    parts: dict[str, Any] = {}
    kinds: Mapping[str, Any] = {"vae": AutoencoderKL, "transformer": PixArtTransformer2DModel}
    for name, kind in kinds.items():
        part = kind.from_config(json.loads(_read(f"{name}/config.json")))
        part.load_state_dict(load(_read(f"{name}/diffusion_pytorch_model.safetensors")))
        parts[name] = part.eval().to(device)
    stock: Any = PixArtAlphaPipeline
    solver: Any = DPMSolverMultistepScheduler
    scheduler = solver.from_config(json.loads(_read("scheduler/scheduler_config.json")))
    pipeline = stock(tokenizer=None, text_encoder=None, scheduler=scheduler, **parts)
    head = TokenHead()
    head.load_state_dict(load(_read("head.safetensors")))
    return ImageModel(NAME, pipeline, [SentenceConditioning(head, device)], STEPS, GUIDANCE, SIZE)


def _read(name: str) -> bytes:
    """One of the model's files, checked against its SHA-256."""
    expected = json.loads(HASHES.read_bytes()).get(name, "") if HASHES.is_file() else None
    return read_own(FOLDER / name, expected, "a file of the text-to-image model")
