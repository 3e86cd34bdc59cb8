from pathlib import Path
from typing import Any

import pytest
import torch
from bridgekit_clap import open_encoder
from bridgekit_clap.text import LAST, MAX_TOKENS

from bridgekit.errors import ItemError
from bridgekit.testing import check_encoder

TEXTS = ["dog bark", "a long glass bell that rings far away in the rain", "Ünïcödé 🐕", "x " * 300]


@pytest.fixture(scope="module")
def encoder(released: Any) -> Any:
    return open_encoder(f"{released.checkpoint},modality=text,tokenizer={released.tokenizer}", "cpu")


def test_vectors_are_laion_claps_own_whatever_the_length_of_the_text(encoder: Any, released: Any) -> None:
    found = encoder.encode([encoder.prepare(text) for text in TEXTS])
    theirs = torch.from_numpy(released.module.get_text_embedding(TEXTS))
    assert found.shape == theirs.shape == (4, 512)
    assert torch.cosine_similarity(found, theirs).min() > 0.99999
    assert (found @ found.T - torch.eye(4)).max() < 0.999


def test_a_long_text_is_cut_as_laion_clap_cuts_it(encoder: Any, released: Any) -> None:
    ids = encoder.prepare("x " * 300)
    assert len(ids) == MAX_TOKENS
    assert ids[-1] == LAST
    assert ids.tolist() == released.module.tokenizer(["x " * 300])["input_ids"][0].tolist()


def test_audio_and_text_of_a_checkpoint_share_a_space_but_not_a_revision(encoder: Any, released: Any) -> None:
    audio = open_encoder(str(released.checkpoint), "cpu")
    assert audio.dim == encoder.dim
    assert audio.revision != encoder.revision


def test_it_keeps_the_contract(released: Any, tmp_path: Path) -> None:
    name = f"clap:{released.checkpoint},modality=text,tokenizer={released.tokenizer}"
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    check_encoder(name, TEXTS[:3], ["", tmp_path / "bad.txt"])


def test_an_empty_text_fails_alone(encoder: Any) -> None:
    with pytest.raises(ItemError):
        encoder.prepare("  ")
