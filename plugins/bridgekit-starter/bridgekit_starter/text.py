"""`starter:text`: all-MiniLM-L6-v2, a small sentence encoder with 384 dimensions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import torch
from safetensors.torch import load
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import normalize
from transformers import BertConfig, BertModel

from bridgekit.encoders import Item
from bridgekit.media import read_text
from bridgekit_starter.weights import MINILM_CONFIG, MINILM_TOKENIZER, MINILM_WEIGHTS

#: Longer texts are truncated. The model was trained with 128 tokens and published with 256.
MAX_TOKENS = 256

#: Maximum tokens per forward pass on a CPU, including padding: keeps the cores busy and fits their caches.
TOKENS_AT_ONCE = 1_024


class TextEncoder:
    """all-MiniLM-L6-v2 as its authors use it: mean over a text's tokens, normalised.

    Raises:
        PluginError: the weights are missing or not the expected ones.
    """

    modality = "text"
    dim = 384
    revision = f"starter:text@{MINILM_WEIGHTS.sha256[:12]}+mean-{MAX_TOKENS}-v1"

    def __init__(self, device: str = "cpu") -> None:
        # Not transformers' wrapper: it sets truncation on every call, which is not thread-safe.
        self._tokenizer = Tokenizer.from_buffer(MINILM_TOKENIZER.read())
        self._tokenizer.enable_truncation(MAX_TOKENS)
        self._tokenizer.no_padding()
        model: torch.nn.Module = BertModel(BertConfig(**json.loads(MINILM_CONFIG.read())), add_pooling_layer=False)
        # The file also contains the pooler, which sentence vectors do not use, and position IDs.
        weights = {
            name: tensor
            for name, tensor in load(MINILM_WEIGHTS.read()).items()
            if not name.startswith("pooler.") and not name.endswith("position_ids")
        }
        model.load_state_dict(weights)
        self._device = torch.device(device)
        self._model = model.eval().to(self._device)

    def prepare(self, item: Item) -> list[int]:
        """The text's token IDs, at most 256.

        Raises:
            ItemError: the text is empty.
        """
        ids: list[int] = self._tokenizer.encode(read_text(item)).ids
        return ids

    @torch.inference_mode()
    def encode(self, batch: Sequence[list[int]]) -> Tensor:
        """n lists of token IDs into a float32 tensor of shape (n, 384) with unit-length rows."""
        if not batch:
            return torch.zeros(0, self.dim)
        order = sorted(range(len(batch)), key=lambda place: len(batch[place]))
        vectors = torch.cat([self._pass(group) for group in self._groups([batch[place] for place in order])])
        return vectors[torch.tensor(order).argsort()].cpu()

    def _groups(self, batch: Sequence[list[int]]) -> Iterator[Sequence[list[int]]]:
        """Cut texts, sorted by length, into groups of at most `TOKENS_AT_ONCE` tokens; on a GPU, one group."""
        start = 0
        for stop in range(1, len(batch) + 1):
            full = stop == len(batch) or (stop + 1 - start) * len(batch[stop]) > TOKENS_AT_ONCE
            if full and (stop == len(batch) or self._device.type == "cpu"):
                yield batch[start:stop]
                start = stop

    def _pass(self, batch: Sequence[list[int]]) -> Tensor:
        lengths = torch.tensor([len(ids) for ids in batch])
        longest = int(lengths.max())
        tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids in batch], device=self._device)
        mask = (torch.arange(longest) < lengths[:, None]).to(self._device)
        hidden = self._model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return normalize(mean, dim=-1)
