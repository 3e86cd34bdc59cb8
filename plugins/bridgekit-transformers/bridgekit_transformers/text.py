"""Text encoders: BERT and its kin, sentence-transformers, decoder-only models, and the text towers of CLIP, SigLIP and CLAP."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from hashlib import sha256
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
)

from bridgekit.encoders import Item
from bridgekit.errors import BridgekitError, ItemError
from bridgekit.media import read_text
from bridgekit_transformers.batching import groups
from bridgekit_transformers.families import POOLINGS
from bridgekit_transformers.loading import Source, load_model, load_part, output_of, vector_width
from bridgekit_transformers.sentences import Layout, read_layout

#: The most tokens in one forward pass, padding included; a single text may have more.
TOKENS_AT_ONCE = 16_384
#: The most tokens of a text where neither tokenizer nor config has a limit.
NO_LIMIT = 512
#: Models whose attention changes with the longest text of a batch.
_BY_LENGTH = ("big_bird",)


class TextEncoder:
    """A text model: tokens through the model, states pooled into one vector.

    Which pooling: what `pooling=` says; or else what the repository's sentence-transformers files say, with the layers behind
    it; or else the projection of a tower, the last token of a decoder-only model, the mean over the tokens of any other.

    Arguments:
        source: a model of the kind `text`.

    Raises:
        PluginError: files are missing or damaged, or the model cannot be pooled.
        BridgekitError: an option has a value that the model does not have.
    """

    modality = "text"

    def __init__(self, source: Source) -> None:
        self._source, self.pinned = source, source.pinned
        layout = Layout() if source.family.heads else read_layout(source)
        self._behind, self._lower = layout.behind, layout.lower
        self._output = ""
        if source.family.heads:
            pooling, head = source.head()
            class_name, self._output = head.model, head.output
            self._poolings: tuple[str, ...] = (pooling,)
            self._unit = head.unit
        else:
            class_name, self._unit = _class_name(source), False
            self._poolings = _poolings(source, layout)
        self._prompt = _prompt(source, layout)
        unused = () if source.family.heads else ("pooler.",)
        self._model = load_model(source, class_name, unused=unused)
        config = self._model.config
        config.use_cache = False  # of a decoder's keys and values, which nobody will ask for
        tokenizer = load_part(source, "AutoTokenizer")
        self._limit = _limit(self._model, tokenizer, layout.tokens)
        self._tokenize = Tokenize(tokenizer, self._limit)
        self._fixed = source.family.fixed_length
        self._pad, self._pad_left = _pad(config, tokenizer, self._fixed), self._fixed and tokenizer.padding_side == "left"
        self._masks = not self._fixed and "attention_mask" in inspect.signature(self._model.forward).parameters
        self._mixed = self._pads_do_not_leak()
        self.dim = vector_width(source, self._vectors([self._tokenize("a")]))
        settings = ["+".join(self._poolings), *layout.describe(), *(["unit"] if self._unit else []), str(self._limit)]
        settings += ["lower"] if self._lower else []
        settings += [f"prompt-{sha256(self._prompt.encode()).hexdigest()[:8]}"] if self._prompt else []
        self.revision = source.revision(*settings)

    def prepare(self, item: Item) -> list[int]:
        """The text's token ids, with the prompt's before them, at most as many as the model reads.

        Raises:
            ItemError: there is no text.
        """
        text = self._prompt + read_text(item)
        return self._tokenize(text.lower() if self._lower else text)

    @torch.inference_mode()
    def encode(self, batch: Sequence[list[int]]) -> Tensor:
        """n lists of token ids into a float32 tensor of shape (n, dim)."""
        vectors = torch.zeros(len(batch), self.dim)
        for group in groups([len(ids) for ids in batch], TOKENS_AT_ONCE, mixed=self._mixed):
            vectors[group] = self._vectors([batch[position] for position in group]).cpu()
        return vectors

    def _pads_do_not_leak(self) -> bool:
        """Whether a short text has the same vector beside a longer one: it does in most models, and this asks the model."""
        if self._source.model_type in _BY_LENGTH or not (self._masks or self._fixed):
            return False
        short, long = self._tokenize("a"), self._tokenize("a b c d e f g h i j k l m n o p q r s t u v w x y z")
        alone, beside = self._vectors([short])[0], self._vectors([short, long])[0]
        return bool((alone - beside).norm() <= 1e-3 * alone.norm())

    @torch.inference_mode()
    def _vectors(self, batch: Sequence[list[int]]) -> Tensor:
        """Token ids of one forward pass into vectors of shape (n, dim)."""
        device = self._source.device
        lengths = torch.tensor([len(ids) for ids in batch], device=device)
        longest = self._limit if self._fixed else int(lengths.max())
        pads = [[self._pad] * (longest - len(ids)) for ids in batch]
        rows = [pad + ids if self._pad_left else ids + pad for ids, pad in zip(batch, pads, strict=True)]
        tokens = torch.tensor(rows, device=device)
        own = torch.arange(longest, device=device) < lengths[:, None]
        outputs = self._model(input_ids=tokens, **({"attention_mask": own.long()} if self._masks else {}))
        if self._output:
            vectors = output_of(self._source, outputs, self._output)
        else:
            states = output_of(self._source, outputs, "last_hidden_state")
            vectors = torch.cat([pool(states, own, pooling) for pooling in self._poolings], dim=-1)
        for layer in self._behind:
            vectors = layer(vectors)
        return normalize(vectors, dim=-1) if self._unit else vectors


def pool(states: Tensor, own: Tensor, pooling: str) -> Tensor:
    """States of shape (n, t, d), of which those where `own`, (n, t), is true are a text's own, into vectors of shape (n, d)."""
    weights = own[..., None].to(states.dtype)
    if pooling == "cls":
        return states[:, 0]
    if pooling == "lasttoken":
        return states[torch.arange(len(states), device=states.device), own.sum(1) - 1]
    if pooling == "max":
        return states.masked_fill(~own[..., None], -torch.inf).amax(1)
    if pooling == "weightedmean":
        weights = weights * torch.arange(1, states.shape[1] + 1, device=states.device)[:, None]
    total, count = (states * weights).sum(1), weights.sum(1)
    return total / (count.sqrt() if pooling == "mean_sqrt_len_tokens" else count)


class Tokenize:
    """Texts into token ids, from any number of threads at once.

    transformers sets truncation in its tokenizer at every call, which is not safe in threads. So where there is one of
    the tokenizers library inside, that is used directly, its truncation set once; any other tokenizer serves one at a time.

    Arguments:
        tokenizer: transformers' own.
        limit: the most tokens, special ones included.
    """

    def __init__(self, tokenizer: Any, limit: int) -> None:
        self._tokenizer, self._limit, self._lock = tokenizer, limit, Lock()
        self._fast = tokenizer.backend_tokenizer if getattr(tokenizer, "is_fast", False) else None
        if self._fast is not None:
            self._fast.enable_truncation(limit, direction=tokenizer.truncation_side)
            self._fast.no_padding()

    def __call__(self, text: str) -> list[int]:
        """The ids of a text's tokens: at least one, at most `limit`."""
        if self._fast is not None:
            ids: list[int] = self._fast.encode(text).ids
        else:
            with self._lock:
                ids = self._tokenizer(text, truncation=True, max_length=self._limit)["input_ids"]
        if not ids:
            raise ItemError("the model's tokenizer makes nothing of this text", where=repr(text[:60]))
        return ids


def _class_name(source: Source) -> str:
    """Of models with an encoder and a decoder the encoder alone, which transformers has of T5 and its kin only."""
    if not source.config.get("is_encoder_decoder"):
        return "AutoModel"
    if source.model_type not in MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES:
        raise source.error(f"does not take models with an encoder and a decoder of type {source.model_type}")
    return "AutoModelForTextEncoding"


def _pad(config: Any, tokenizer: Any, fixed: bool) -> int:
    """The token that fills up shorter texts.

    Where it is masked it would not matter, but some models count positions from the first token that is not their config's.
    Where it is not masked the model reads it, as the tokenizer gave it in training.
    """
    known = [getattr(config, "pad_token_id", None), tokenizer.pad_token_id]
    return int(next((token for token in (reversed(known) if fixed else known) if token is not None), 0))


def _poolings(source: Source, layout: Layout) -> tuple[str, ...]:
    if "pooling" not in source.options and layout.poolings:
        return layout.poolings
    only_decodes = source.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    only_decodes = only_decodes and source.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    default = "lasttoken" if only_decodes else "mean"
    return (source.choose("pooling", (default, *(name for name in POOLINGS if name != default))),)


def _prompt(source: Source, layout: Layout) -> str:
    """What is put before each text: the prompt of that name, or the value itself if it is a sentence rather than a name."""
    requested = source.options.get("prompt", layout.default_prompt)
    if not requested:
        return ""
    if requested in layout.prompts:
        return str(layout.prompts[requested])
    if any(not (letter.isalnum() or letter in "_-.") for letter in requested):
        return requested
    names = ", ".join(layout.prompts)
    raise BridgekitError(
        f"this model has no prompt of the name {requested!r}",
        where=f"transformers:{source.name}",
        remedy=(f"its prompts are {names}; " if names else "it names none; ") + "a prompt of your own has a space or a colon",
    )


def _limit(model: Any, tokenizer: Any, stated: int | None) -> int:
    """The most tokens that a text may have: the least of what the repository, the tokenizer and the positions allow."""
    limits = [stated, tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None)]
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from the one behind the padding's.
        if name.endswith("embeddings.position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    known = [int(limit) for limit in limits if limit and 0 < limit < 1_000_000]
    return min(known, default=NO_LIMIT)
