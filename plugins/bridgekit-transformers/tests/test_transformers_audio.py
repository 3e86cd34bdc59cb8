from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from bridgekit.errors import BridgekitError
from bridgekit.media import read_audio
from bridgekit.plugins import load_encoder
from bridgekit.testing import check_encoder

Tiny = Callable[..., Path]


def vectors(name: str, clips: list[Path]) -> Tensor:
    encoder = load_encoder(f"transformers:{name}", "cpu")
    return encoder.encode([encoder.prepare(clip) for clip in clips])


def assert_same(found: Tensor, expected: list[Tensor]) -> None:
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-3)


def outputs(folder: Path, clip: Path, model: str = "AutoModel", **inputs: Any) -> Any:
    """transformers' own extractor and call for one clip alone."""
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    wave = read_audio(clip, extractor.sampling_rate)
    features = dict(extractor(wave, sampling_rate=extractor.sampling_rate, return_tensors="pt")) | inputs
    features.pop("attention_mask", None)
    with torch.inference_mode():
        return getattr(transformers, model).from_pretrained(folder)(**features, output_hidden_states=True)


@pytest.mark.parametrize("kind", list(tiny_models.WAVE_KINDS))
def test_a_model_of_samples_gives_the_mean_over_a_clips_frames(tiny: Tiny, clips: list[Path], kind: str) -> None:
    clips = clips[:4]  # the last is too short for this formula
    expected = [outputs(tiny(kind), clip).last_hidden_state[0].mean(0) for clip in clips]
    assert_same(vectors(str(tiny(kind)), clips), expected)


@pytest.mark.parametrize("kind", ["wav2vec2-group", "wav2vec2-layer", "wavlm"])
def test_layers_stand_side_by_side(tiny: Tiny, clips: list[Path], kind: str) -> None:
    found = outputs(tiny(kind), clips[0])
    expected = torch.cat([found.hidden_states[1][0].mean(0), found.last_hidden_state[0].mean(0)])
    assert_same(vectors(f"{tiny(kind)},layers=1+last", clips[:1]), [expected])


@pytest.mark.parametrize("asked", ["0", "3", "first", "1+1", ""])
def test_layers_that_the_model_lacks_are_refused(tiny: Tiny, asked: str) -> None:
    with pytest.raises(BridgekitError, match="the model has no layers") as caught:
        load_encoder(f"transformers:{tiny('hubert')},layers={asked}", "cpu")
    assert "from 1 to 2" in str(caught.value.remedy)


def test_padding_to_a_longer_clip_leaks_into_no_vector(tiny: Tiny, clips: list[Path]) -> None:
    for kind in tiny_models.WAVE_KINDS:
        together = vectors(str(tiny(kind)), clips)
        alone = torch.cat([vectors(str(tiny(kind)), [clip]) for clip in clips])
        torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4, msg=kind)


def test_a_long_clip_is_encoded_in_windows_to_its_end(tiny: Tiny, tmp_path: Path) -> None:
    clip = tiny_models.write_sound(tmp_path / "long.wav", 70.0, 16_000, 0)
    encoder = load_encoder(f"transformers:{tiny('wavlm')}", "cpu")
    prepared = encoder.prepare(clip)
    assert prepared.samples == (373_334, 373_334, 373_332)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tiny("wavlm"))
    model = transformers.AutoModel.from_pretrained(tiny("wavlm"))
    frames = []
    for piece in np.split(read_audio(clip, 16_000), [373_334, 746_668]):
        values = extractor(piece, sampling_rate=16_000, return_tensors="pt").input_values
        with torch.inference_mode():
            frames.append(model(values).last_hidden_state[0])
    assert_same(encoder.encode([prepared]), [torch.cat(frames).mean(0)])


def test_weights_under_the_names_of_older_versions_are_loaded(tiny: Tiny, tmp_path: Path, clips: list[Path]) -> None:
    for file in tiny("wav2vec2-layer").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    new = "conv.parametrizations.weight.original"
    weights = {
        "wav2vec2." + name.replace(f"{new}0", "conv.weight_g").replace(f"{new}1", "conv.weight_v"): weight
        for name, weight in load_file(tmp_path / "model.safetensors").items()
        if name != "masked_spec_embed"
    }
    assert sum("weight_g" in name or "weight_v" in name for name in weights) == 2
    save_file(weights | {"lm_head.weight": torch.zeros(32, 32)}, tmp_path / "model.safetensors", {"format": "pt"})
    torch.testing.assert_close(vectors(str(tmp_path), clips[:1]), vectors(str(tiny("wav2vec2-layer")), clips[:1]))


def test_ast_gives_its_pooled_output_or_its_class_token(tiny: Tiny, clips: list[Path]) -> None:
    short = clips[:1]
    found = outputs(tiny("ast"), short[0])
    assert_same(vectors(str(tiny("ast")), short), [found.pooler_output[0]])
    assert_same(vectors(f"{tiny('ast')},pooling=cls", short), [found.last_hidden_state[0, 0]])


def test_ast_encodes_all_of_a_clip_that_is_longer_than_its_spectrogram(tiny: Tiny, clips: list[Path]) -> None:
    encoder = load_encoder(f"transformers:{tiny('ast')}", "cpu")
    prepared = encoder.prepare(clips[2])  # 3.1 s; a spectrogram holds 1.28 s
    assert prepared.samples == (16_534, 16_534, 16_532)
    windows = [type(prepared)((window,), (1,)) for window in prepared.windows]
    torch.testing.assert_close(encoder.encode([prepared])[0], encoder.encode(windows).mean(0))


@pytest.mark.parametrize("kind", ["clap", "clap-fused"])
def test_claps_audio_tower_gives_its_projection_at_length_1(tiny: Tiny, clips: list[Path], kind: str) -> None:
    model = transformers.ClapModel.from_pretrained(tiny(kind))
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tiny(kind))
    short = [clips[0], clips[1], clips[3]]  # a spectrogram holds 2 s
    expected = []
    for clip in short:
        features = extractor(read_audio(clip, 48_000), sampling_rate=48_000, return_tensors="pt").input_features
        with torch.inference_mode():
            pooled = model.audio_model(input_features=features, is_longer=torch.zeros(1, 1)).pooler_output
            vector = model.audio_projection(pooled)[0]
        expected.append(vector / vector.norm())
    assert_same(vectors(f"{tiny(kind)},modality=audio", short), expected)


def test_a_clip_that_is_too_long_for_clap_has_one_vector_however_often_it_is_read(tiny: Tiny, clips: list[Path]) -> None:
    first, second = (vectors(f"{tiny('clap')},modality=audio", [clips[2]]) for _ in range(2))
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(1))


@pytest.mark.parametrize("window", ["own", "30s"])
def test_whisper_gives_the_mean_over_a_clips_own_frames(tiny: Tiny, clips: list[Path], window: str) -> None:
    found = []
    for clip in clips[:4]:
        wave = read_audio(clip, 16_000)
        frames = -(-len(wave) // 320)
        extractor = transformers.WhisperFeatureExtractor.from_pretrained(tiny("whisper"))
        model = transformers.WhisperModel.from_pretrained(tiny("whisper")).encoder
        if window == "own":  # transformers' own encoder wants a whole window, so a model with fewer positions is made
            config = transformers.WhisperConfig.from_pretrained(tiny("whisper"), max_source_positions=frames)
            whole, model = model, type(model)(config).eval()
            model.load_state_dict({name: w[:frames] if "positions" in name else w for name, w in whole.state_dict().items()})
        size = frames * 320 if window == "own" else 480_000
        padded = np.pad(wave, (0, size - len(wave)))
        mel = extractor(padded, sampling_rate=16_000, padding=False, return_tensors="pt").input_features
        with torch.inference_mode():
            states = model(mel, output_hidden_states=True)
        found.append(torch.cat([states.hidden_states[2][0, :frames].mean(0), states.last_hidden_state[0, :frames].mean(0)]))
    assert_same(vectors(f"{tiny('whisper')},layers=2+last,window={window}", clips[:4]), found)


def test_whispers_last_layer_may_be_named_by_its_number(tiny: Tiny, clips: list[Path]) -> None:
    by_name, by_number = (load_encoder(f"transformers:{tiny('whisper')},layers={layer}", "cpu") for layer in ("last", "3"))
    assert by_name.revision == by_number.revision == load_encoder(f"transformers:{tiny('whisper')}", "cpu").revision


def test_whisper_is_loaded_from_an_encoder_alone_too(tiny: Tiny, tmp_path: Path, clips: list[Path]) -> None:
    for file in tiny("whisper").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    encoder = {name: weight for name, weight in weights.items() if name.startswith("model.encoder.")}
    for prefix in ("model.", ""):  # as WhisperForConditionalGeneration and as WhisperModel name it
        kept = {prefix + name.removeprefix("model."): weight for name, weight in encoder.items()}
        save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
        torch.testing.assert_close(vectors(str(tmp_path), clips[:1]), vectors(str(tiny("whisper")), clips[:1]))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("whisper", ",layers=1+last"),
        ("wav2vec2-group", ""),
        ("clap", ",modality=audio"),
    ],
)
def test_audio_models_keep_the_contract(
    tiny: Tiny, clips: list[Path], not_a_file_of_the_kind: Path, tmp_path: Path, kind: str, options: str
) -> None:
    (tmp_path / "empty.wav").touch()
    bad = [not_a_file_of_the_kind, tmp_path / "empty.wav", tmp_path / "missing.wav"]
    check_encoder(f"transformers:{tiny(kind)}{options}", clips, bad, changed=f"transformers:{tiny(kind, seed=1)}{options}")
