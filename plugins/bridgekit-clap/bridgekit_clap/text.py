"""`clap:CHECKPOINT,modality=text`: the text tower of LAION-CLAP, projected into the space shared with the audio tower."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from bridgekit.encoders import Item
from bridgekit.errors import PluginError, one_line
from bridgekit.hub import DownloadRefused, content_revision, model_folder
from bridgekit.media import read_text
from bridgekit_clap.checkpoints import find_checkpoint, read_weights
from bridgekit_clap.towers import VOCABULARY, build_tower

#: Texts are truncated to this many tokens, as in laion_clap.
MAX_TOKENS = 77
#: roberta-base's ids of the first token, padding and the last token.
FIRST, PADDING, LAST = 0, 1, 2

#: The tokenizer's hub id in laion_clap, under which it may be cached, and its new id.
HUB_IDS = ("roberta-base", "FacebookAI/roberta-base")
REQUIRED = ("vocab.json", "merges.txt")
#: Further files in its folder that affect the tokens.
OPTIONAL = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class TextEncoder:
    """Encodes texts like laion_clap's `CLAP_Module.get_text_embedding`: RoBERTa's pooled state, projected, of unit length.

    Arguments:
        checkpoint: the path of a checkpoint, or the name of a published one.
        device: a torch device.
        tokenizer: the folder or hub id of roberta-base's tokenizer; None for the hub cache, or else the hub.

    Raises:
        PluginError: the checkpoint or tokenizer cannot be found or is wrong, or laion_clap cannot be imported.
    """

    modality = "text"

    def __init__(self, checkpoint: str, device: str = "cpu", *, tokenizer: str | None = None) -> None:
        file = find_checkpoint(checkpoint)
        folder = find_tokenizer(tokenizer)
        self._tokenizer = open_tokenizer(folder)
        model, _ = build_tower("text", read_weights(file), file)
        vocabulary = [folder / name for name in (*REQUIRED, *OPTIONAL) if (folder / name).is_file()]
        settings = ("text", f"{MAX_TOKENS} tokens", version("laion-clap"))
        self.revision = f"clap:text@{content_revision([file, *vocabulary], *settings)}"
        self.dim: int = model.text_projection[-1].out_features
        self._model = model.to(device)

    def prepare(self, item: Item) -> Tensor:
        """The text's token ids, int64 of shape (tokens,), at most 77.

        Raises:
            ItemError: the text is empty.
        """
        # Truncated here: the tokenizer's own truncation changes its state, which is not thread-safe.
        ids = self._tokenizer(read_text(item), verbose=False)["input_ids"]
        return torch.tensor(ids if len(ids) <= MAX_TOKENS else [*ids[: MAX_TOKENS - 1], LAST])

    @torch.inference_mode()
    def encode(self, batch: Sequence[Tensor]) -> Tensor:
        """n prepared texts to a float32 tensor of shape (n, dim) with unit rows; dim is 512 in all published models."""
        if not batch:
            return torch.zeros(0, self.dim)
        longest = max(len(ids) for ids in batch)
        ids = torch.stack([pad(ids, (0, longest - len(ids)), value=PADDING) for ids in batch])
        found: Tensor = self._model.get_text_embedding({"input_ids": ids, "attention_mask": (ids != PADDING).long()})
        return found.cpu()


def find_tokenizer(given: str | None) -> Path:
    """The folder with roberta-base's vocabulary and merges: the given one, the hub cache, or a download from the hub.

    Raises:
        PluginError: it cannot be found. The message says how to get it and pass it.
    """
    try:
        folder = (None if given else _in_old_cache()) or model_folder(
            given or HUB_IDS[1], (*REQUIRED, *OPTIONAL), plugin="bridgekit-clap"
        )
    except DownloadRefused:
        raise
    except PluginError as error:
        raise _needed(error.what.removeprefix("bridgekit-clap "), given) from error
    missing = [name for name in REQUIRED if not (folder / name).is_file()]
    if missing:
        raise _needed(f"{folder} lacks {' and '.join(missing)}", given)
    return folder


def _in_old_cache() -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(HUB_IDS[0], name) for name in REQUIRED]
    files = [Path(file) for file in found if isinstance(file, str)]
    return files[0].parent if len(files) == len(REQUIRED) else None


def open_tokenizer(folder: Path) -> Any:
    """Open the tokenizer in a folder.

    Raises:
        PluginError: it cannot be read, or is not roberta-base's.
    """
    from transformers import RobertaTokenizer

    try:
        tokenizer = RobertaTokenizer.from_pretrained(str(folder), local_files_only=True)
        empty = tokenizer("")["input_ids"]
    except Exception as error:  # transformers may raise anything for damaged files
        raise _needed(f"the given one cannot be read: {one_line(error)}", str(folder)) from error
    if empty != [FIRST, LAST] or len(tokenizer) > VOCABULARY:
        raise _needed("the given one has different tokens", str(folder))
    return tokenizer


def _needed(why: str, given: str | None) -> PluginError:
    get = f"hf download {HUB_IDS[1]} {' '.join(REQUIRED)} --local-dir roberta-base"
    return PluginError(
        f"bridgekit-clap needs roberta-base's tokenizer for text ({why})",
        where=given,
        remedy=f"{get}; then add ,tokenizer=roberta-base to the name",
    )
