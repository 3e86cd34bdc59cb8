import os

os.environ["HF_HUB_OFFLINE"] = "1"

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from bridgekit_starter.text import MAX_TOKENS, TOKENS_AT_ONCE, TextEncoder

from bridgekit.errors import ItemError
from bridgekit.latents.batches import agreement

TRIPLES = [  # a text, the same said otherwise, and a stranger
    ("A dog is barking in the yard.", "You can hear a hound bark outside.", "The bank raised its interest rates."),
    ("Rain falls on a tin roof.", "It is raining and drops hit the metal roof.", "A violinist tunes her instrument."),
    ("The children are laughing.", "Kids giggle together.", "The engine of the truck will not start."),
    ("He bought a new bicycle last week.", "A week ago he purchased a bike.", "The soup needs more salt."),
    ("How do I reset my password?", "I forgot my login and need a new one.", "Which bird sings at night?"),
    ("smiling face with sunglasses", "a cool, happy emoji wearing shades", "fax machine"),
]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder("cpu")


def vectors(encoder: TextEncoder, *texts: str) -> torch.Tensor:
    return encoder.encode([encoder.prepare(text) for text in texts])


@pytest.mark.parametrize("triple", TRIPLES, ids=[triple[0] for triple in TRIPLES])
def test_a_paraphrase_is_nearer_than_a_stranger(encoder: TextEncoder, triple: tuple[str, str, str]) -> None:
    text, paraphrase, stranger = vectors(encoder, *triple)
    assert text @ paraphrase > text @ stranger + 0.2


def test_vectors_are_float32_of_the_stated_width_and_of_length_1(encoder: TextEncoder) -> None:
    found = vectors(encoder, "one", "two words")
    assert found.shape == (2, encoder.dim)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))


def test_a_text_has_the_same_vector_alone_and_beside_longer_ones(encoder: TextEncoder) -> None:
    alone = vectors(encoder, "A short text.")
    beside = vectors(encoder, "A short text.", "A very much longer text, " * 40)[:1]
    torch.testing.assert_close(alone, beside, atol=1e-6, rtol=0)


def test_many_texts_of_all_lengths_keep_their_order_and_their_vectors(encoder: TextEncoder) -> None:
    texts = [f"text {number} " + "of many words " * (number * 7 % 60) for number in range(100)]
    assert sum(len(encoder.prepare(text)) for text in texts) > 4 * TOKENS_AT_ONCE
    alone = torch.cat([vectors(encoder, text) for text in texts[::7]])
    torch.testing.assert_close(vectors(encoder, *texts)[::7], alone, atol=1e-6, rtol=0)


def test_bfloat16_agrees_with_float32(encoder: TextEncoder) -> None:
    texts = [text for triple in TRIPLES for text in triple]
    full = vectors(encoder, *texts)
    with torch.autocast("cpu", torch.bfloat16):
        reduced = vectors(encoder, *texts)
    assert reduced.dtype == torch.float32
    assert not torch.equal(full, reduced)
    assert agreement(full, reduced) > 0.9998


def test_what_lies_beyond_the_last_token_does_not_count(encoder: TextEncoder) -> None:
    long = "word " * MAX_TOKENS
    assert len(encoder.prepare(long)) == MAX_TOKENS
    torch.testing.assert_close(vectors(encoder, long + "and an elephant"), vectors(encoder, long + "or the stock market"))


def test_many_threads_prepare_the_same_as_one(encoder: TextEncoder) -> None:
    texts = [f"text {number} " * (1 + number % 300) for number in range(400)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(encoder.prepare, texts)) == [encoder.prepare(text) for text in texts]


def test_a_blank_text_fails_alone(encoder: TextEncoder) -> None:
    with pytest.raises(ItemError):
        encoder.prepare("  \n")


def test_the_vectors_are_those_of_sentence_transformers(encoder: TextEncoder) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from bridgekit_starter.weights import MINILM_WEIGHTS

    theirs = sentence_transformers.SentenceTransformer(str(MINILM_WEIGHTS.locate().parent), device="cpu", local_files_only=True)
    texts = [text for triple in TRIPLES for text in triple] + ["Ünïcödé, 漢字 and 🦊", "long " * 400]
    torch.testing.assert_close(vectors(encoder, *texts), torch.from_numpy(theirs.encode(texts)), atol=1e-5, rtol=0)
