"""`clap:CHECKPOINT,modality=text`: the text tower of LAION-CLAP, in the space that it shares with the audio tower."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from bridgekit.encoders import Item
from bridgekit.errors import PluginError
from bridgekit.hub import content_revision, model_folder
from bridgekit.media import read_text
from bridgekit_clap.checkpoints import find_checkpoint, read_weights
from bridgekit_clap.towers import VOCABULARY, build_tower

#: What laion_clap cuts texts to; the rest is not seen.
MAX_TOKENS = 77
#: The ids in roberta-base of a text's first token, of padding, and of a text's last token.
FIRST, PADDING, LAST = 0, 1, 2

#: Where laion_clap looks for its tokenizer, and so where it may be in the hub's cache; then the place to which it has moved.
HUB_IDS = ("roberta-base", "FacebookAI/roberta-base")
REQUIRED = ("vocab.json", "merges.txt")
#: What else may be in its folder and have a say in the tokens.
OPTIONAL = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class TextEncoder:
    """A text as `CLAP_Module.get_text_embedding` of laion_clap encodes it: RoBERTa's pooled state, projected, of length 1.

    Arguments:
        checkpoint: the path of a checkpoint, or the name of a published one.
        device: a torch device.
        tokenizer: the folder or hub id of roberta-base's tokenizer; None looks in the hub's cache, then on the hub.

    Raises:
        PluginError: the checkpoint or the tokenizer cannot be found or is not the right one, or laion_clap cannot be imported.
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
            ItemError: there is no text.
        """
        # Cut here: a tokenizer that is told to cut changes its state, which is not safe in threads.
        ids = self._tokenizer(read_text(item), verbose=False)["input_ids"]
        return torch.tensor(ids if len(ids) <= MAX_TOKENS else [*ids[: MAX_TOKENS - 1], LAST])

    @torch.inference_mode()
    def encode(self, batch: Sequence[Tensor]) -> Tensor:
        """n prepared texts into a float32 tensor of shape (n, dim), dim 512 in all published ones; its rows have length 1."""
        if not batch:
            return torch.zeros(0, self.dim)
        longest = max(len(ids) for ids in batch)
        ids = torch.stack([pad(ids, (0, longest - len(ids)), value=PADDING) for ids in batch])
        found: Tensor = self._model.get_text_embedding({"input_ids": ids, "attention_mask": (ids != PADDING).long()})
        return found.cpu()


def find_tokenizer(given: str | None) -> Path:
    """The folder with roberta-base's vocabulary and merges: the given one, the hub's cache, or fetched from the hub.

    Raises:
        PluginError: it is in none of them. The message says how to get it and how to name it.
    """
    try:
        folder = (None if given else _in_old_cache()) or model_folder(
            given or HUB_IDS[1], (*REQUIRED, *OPTIONAL), plugin="bridgekit-clap"
        )
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
    """The tokenizer of a folder.

    Raises:
        PluginError: it cannot be read, or is another one than roberta-base's.
    """
    from transformers import RobertaTokenizer

    try:
        tokenizer = RobertaTokenizer.from_pretrained(str(folder), local_files_only=True)
        nothing = tokenizer("")["input_ids"]
    except Exception as error:  # whatever a damaged file brings it to
        raise _needed(f"the one there cannot be read: {' '.join(str(error).split())[:200]}", str(folder)) from error
    if nothing != [FIRST, LAST] or len(tokenizer) > VOCABULARY:
        raise _needed("the one there has other tokens", str(folder))
    return tokenizer


def _needed(why: str, given: str | None) -> PluginError:
    get = f"hf download {HUB_IDS[1]} {' '.join(REQUIRED)} --local-dir roberta-base"
    return PluginError(
        f"bridgekit-clap needs roberta-base's tokenizer for texts ({why})",
        where=given,
        remedy=f"{get}; then add ,tokenizer=roberta-base to the name",
    )
