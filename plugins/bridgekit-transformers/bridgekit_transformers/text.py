"""Text encoders: BERT-like models, sentence-transformers, decoder-only models, and text towers of CLIP, SigLIP and CLAP."""

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
from bridgekit_transformers.layers import counted_layers, join_layers, layers_setting
from bridgekit_transformers.loading import Source, load_model, load_part, output_of, vector_width
from bridgekit_transformers.sentences import Layout, read_layout

#: Maximum tokens per forward pass, padding included; a single text may exceed it.
TOKENS_AT_ONCE = 16_384
#: Maximum tokens of a text if neither tokenizer nor config has a limit.
NO_LIMIT = 512
#: Models whose attention depends on the longest text of a batch.
_BY_LENGTH = ("big_bird",)


class TextEncoder:
    """A text model whose states are pooled to one vector.

    The pooling is given by `pooling=`, or else by the repository's sentence-transformers files, with further layers; otherwise
    it is the projection of a tower, the last token of a decoder-only model, or the mean over tokens for any other.
    With `layers=`, hidden states before the last are averaged over the text's tokens, and concatenated with that vector.

    Arguments:
        source: a model of the kind `text`.

    Raises:
        PluginError: files are missing or damaged, or the model cannot be pooled.
        BridgekitError: the model does not support an option's value.
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
        config.use_cache = False  # no key-value cache: nothing is generated
        tokenizer = load_part(source, "AutoTokenizer")
        self._limit = _limit(self._model, tokenizer, layout.tokens)
        self._tokenize = Tokenize(tokenizer, self._limit)
        self._fixed = source.family.fixed_length
        self._pad, self._pad_left = _pad(config, tokenizer, self._fixed), self._fixed and tokenizer.padding_side == "left"
        self._masks = not self._fixed and "attention_mask" in inspect.signature(self._model.forward).parameters
        letter = [self._tokenize("a")]
        self._layers, self._count = counted_layers(source, lambda: self._outputs(letter, earlier=True)[1])
        self._earlier = self._layers != (self._count,)
        self._mixed = self._pads_do_not_leak()
        self.dim = vector_width(source, self._vectors(letter))
        settings = ["+".join(self._poolings), *layout.describe(), *(["unit"] if self._unit else []), str(self._limit)]
        settings += [layers_setting(self._layers, self._count)] if self._earlier else []
        settings += ["lower"] if self._lower else []
        settings += [f"prompt-{sha256(self._prompt.encode()).hexdigest()[:8]}"] if self._prompt else []
        self.revision = source.revision(*settings)

    def prepare(self, item: Item) -> list[int]:
        """The token ids of the prompt and the text, truncated to the model's limit.

        Raises:
            ItemError: the text is empty.
        """
        text = self._prompt + read_text(item)
        return self._tokenize(text.lower() if self._lower else text)

    @torch.inference_mode()
    def encode(self, batch: Sequence[list[int]]) -> Tensor:
        """n lists of token ids to a float32 tensor of shape (n, dim)."""
        vectors = torch.zeros(len(batch), self.dim)
        for group in groups([len(ids) for ids in batch], TOKENS_AT_ONCE, mixed=self._mixed):
            vectors[group] = self._vectors([batch[position] for position in group]).cpu()
        return vectors

    def _pads_do_not_leak(self) -> bool:
        """Whether a short text has the same vector when batched with a longer one, checked by running the model."""
        if self._source.model_type in _BY_LENGTH or not (self._masks or self._fixed):
            return False
        short, long = self._tokenize("a"), self._tokenize("a b c d e f g h i j k l m n o p q r s t u v w x y z")
        alone, beside = self._vectors([short])[0], self._vectors([short, long])[0]
        return bool((alone - beside).norm() <= 1e-3 * alone.norm())

    @torch.inference_mode()
    def _vectors(self, batch: Sequence[list[int]]) -> Tensor:
        """Token ids to vectors of shape (n, dim)."""
        own, outputs = self._outputs(batch, earlier=self._earlier)
        last = self._last(own, outputs)
        return join_layers(self._layers, self._count, last, lambda layer: pool(outputs.hidden_states[layer], own, "mean"))

    @torch.inference_mode()
    def _outputs(self, batch: Sequence[list[int]], *, earlier: bool) -> tuple[Tensor, Any]:
        """One forward pass: which tokens are not padding, (n, t), and the model's outputs."""
        device = self._source.device
        lengths = torch.tensor([len(ids) for ids in batch], device=device)
        longest = self._limit if self._fixed else int(lengths.max())
        pads = [[self._pad] * (longest - len(ids)) for ids in batch]
        rows = [pad + ids if self._pad_left else ids + pad for ids, pad in zip(batch, pads, strict=True)]
        tokens = torch.tensor(rows, device=device)
        own = torch.arange(longest, device=device) < lengths[:, None]
        own = own.flip(1) if self._pad_left else own
        arguments: dict[str, Any] = {"attention_mask": own.long()} if self._masks else {}
        arguments |= {"output_hidden_states": True} if earlier else {}
        return own, self._model(input_ids=tokens, **arguments)

    def _last(self, own: Tensor, outputs: Any) -> Tensor:
        """The vectors of the model's output, pooled and through the layers behind it, (n, d)."""
        if self._output:
            vectors = output_of(self._source, outputs, self._output)
        else:
            states = output_of(self._source, outputs, "last_hidden_state")
            vectors = torch.cat([pool(states, own, pooling) for pooling in self._poolings], dim=-1)
        for layer in self._behind:
            vectors = layer(vectors)
        return normalize(vectors, dim=-1) if self._unit else vectors


def pool(states: Tensor, own: Tensor, pooling: str) -> Tensor:
    """Pool states of shape (n, t, d) to (n, d); the mask `own`, (n, t), is true for tokens that are not padding."""
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
    """Thread-safe tokenization.

    transformers sets a tokenizer's truncation at every call, which is not thread-safe. If the tokenizer is backed by the
    tokenizers library, that is used directly, with truncation set once; calls to other tokenizers are serialised.

    Arguments:
        tokenizer: a transformers tokenizer.
        limit: maximum number of tokens, including special ones.
    """

    def __init__(self, tokenizer: Any, limit: int) -> None:
        self._tokenizer, self._limit, self._lock = tokenizer, limit, Lock()
        self._fast = tokenizer.backend_tokenizer if getattr(tokenizer, "is_fast", False) else None
        if self._fast is not None:
            self._fast.enable_truncation(limit, direction=tokenizer.truncation_side)
            self._fast.no_padding()

    def __call__(self, text: str) -> list[int]:
        """The token ids of a text: at least one, at most `limit`."""
        if self._fast is not None:
            ids: list[int] = self._fast.encode(text).ids
        else:
            with self._lock:
                ids = self._tokenizer(text, truncation=True, max_length=self._limit)["input_ids"]
        if not ids:
            raise ItemError("the model's tokenizer returns no tokens for this text", where=repr(text[:60]))
        return ids


def _class_name(source: Source) -> str:
    """The class to load; of encoder-decoder models only the encoder, which transformers supports for the T5 family."""
    if not source.config.get("is_encoder_decoder"):
        return "AutoModel"
    if source.model_type not in MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES:
        raise source.error(f"does not support encoder-decoder models of type {source.model_type}")
    return "AutoModelForTextEncoding"


def _pad(config: Any, tokenizer: Any, fixed: bool) -> int:
    """The padding token.

    If it is masked, use the config's, since some models count positions from the first token that differs from it. If not,
    the model reads it, so use the tokenizer's, as in training.
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
    """The prompt to prepend to texts: the repository's by name, or the option's value itself if it is not a plain name."""
    prompt = source.options.get("prompt", layout.default_prompt)
    if not prompt:
        return ""
    if prompt in layout.prompts:
        return str(layout.prompts[prompt])
    if any(not (letter.isalnum() or letter in "_-.") for letter in prompt):
        return prompt
    names = ", ".join(layout.prompts)
    raise BridgekitError(
        f"the model has no prompt named {prompt!r}",
        where=f"transformers:{source.name}",
        remedy=(f"its prompts are {names}; " if names else "it has none; ") + "a custom prompt must contain a space or a colon",
    )


def _limit(model: Any, tokenizer: Any, stated: int | None) -> int:
    """Maximum tokens of a text: the minimum of the limits of repository, tokenizer and position embeddings."""
    limits = [stated, tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None)]
    for name, module in model.named_modules():
        # RoBERTa-like models start positions after the padding index.
        if name.endswith("embeddings.position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    known = [int(limit) for limit in limits if limit and 0 < limit < 1_000_000]
    return min(known, default=NO_LIMIT)
