from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from torch import Tensor
from torch.nn.functional import normalize

from bridgekit.errors import BridgekitError, PluginError
from bridgekit.media import read_image
from bridgekit.plugins import load_encoder
from bridgekit.testing import check_encoder

Tiny = Callable[..., Path]
TEXTS = ["a dog", "a much longer text", "x"]


def vectors(name: str, items: list[str] | list[Path]) -> Tensor:
    encoder = load_encoder(f"transformers:{name}", "cpu")
    return encoder.encode([encoder.prepare(item) for item in items])


def features(found: object) -> Tensor:
    """What get_*_features gave: transformers 5 wraps it."""
    vector = getattr(found, "pooler_output", found)
    assert isinstance(vector, Tensor)
    return vector


@pytest.mark.parametrize(
    ("kind", "towers"), [("clip", "text or image"), ("siglip", "text or image"), ("clap", "text or audio")]
)
def test_a_model_with_two_towers_requires_a_choice(tiny: Tiny, kind: str, towers: str) -> None:
    one, other = towers.split(" or ")
    with pytest.raises(BridgekitError, match="two towers") as caught:
        load_encoder(f"transformers:{tiny(kind)}", "cpu")
    assert caught.value.remedy == f"add ,modality={one} or add ,modality={other}"


def test_a_tower_that_a_model_lacks_is_refused(tiny: Tiny) -> None:
    with pytest.raises(BridgekitError, match="no tower for 'audio'"):
        load_encoder(f"transformers:{tiny('clip')},modality=audio", "cpu")


def test_an_openclip_repository_is_opened_by_its_transformers_files_and_refused_without_them(tmp_path: Path) -> None:
    tiny_models.write_json(tmp_path / "open_clip_config.json", {"model_cfg": {"embed_dim": 20}})
    with pytest.raises(PluginError, match="does not read OpenCLIP's own format") as caught:
        load_encoder(f"transformers:{tmp_path}", "cpu")
    assert "open its image tower by timm" in str(caught.value.remedy)
    tiny_models.build("clip", tmp_path)
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(b"weights that are not read")
    assert load_encoder(f"transformers:{tmp_path},modality=text", "cpu").dim == 20
    assert load_encoder(f"transformers:{tmp_path},modality=image", "cpu").dim == 20


@pytest.mark.parametrize("kind", ["clip", "clap"])
def test_a_text_tower_gives_the_features_of_the_whole_model(tiny: Tiny, kind: str) -> None:
    model = transformers.AutoModel.from_pretrained(tiny(kind))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny(kind))
    for text, found in zip(TEXTS, vectors(f"{tiny(kind)},modality=text", TEXTS), strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            expected = features(model.get_text_features(inputs["input_ids"], attention_mask=inputs["attention_mask"]))[0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_siglips_texts_are_padded_to_their_full_length_as_in_its_training(tiny: Tiny, kind: str) -> None:
    if kind == "siglip2" and not hasattr(transformers, "Siglip2Model"):
        pytest.skip("this version of transformers has no SigLIP 2")
    model = transformers.AutoModel.from_pretrained(tiny(kind))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny(kind))
    for text, found in zip(TEXTS, vectors(f"{tiny(kind)},modality=text", TEXTS), strict=True):
        ids = tokenizer(text, padding="max_length", max_length=24, return_tensors="pt")["input_ids"]
        assert ids.shape == (1, 24)
        with torch.inference_mode():
            expected = features(model.get_text_features(ids))[0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2"])
def test_an_image_tower_gives_the_features_of_the_whole_model(tiny: Tiny, pictures: list[Path], kind: str) -> None:
    if kind == "siglip2" and not hasattr(transformers, "Siglip2Model"):
        pytest.skip("this version of transformers has no SigLIP 2")
    model = transformers.AutoModel.from_pretrained(tiny(kind))
    encoder = load_encoder(f"transformers:{tiny(kind)},modality=image", "cpu")
    found = encoder.encode([encoder.prepare(picture) for picture in pictures])
    for picture, vector in zip(pictures, found, strict=True):
        inputs = {name: value[None] for name, value in encoder.prepare(picture).items()}
        with torch.inference_mode():
            expected = features(model.get_image_features(**inputs))[0]
        torch.testing.assert_close(vector, expected, atol=1e-5, rtol=1e-4)


def test_an_image_tower_sees_what_pillow_makes_of_a_picture(tiny: Tiny, pictures: list[Path]) -> None:
    import numpy as np
    from PIL import Image

    pixels = load_encoder(f"transformers:{tiny('siglip')},modality=image", "cpu").prepare(pictures[1])["pixel_values"]
    image = read_image(pictures[1]).resize((32, 32), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)


def test_clips_vision_tower_has_other_poolings(tiny: Tiny, pictures: list[Path]) -> None:
    encoder = load_encoder(f"transformers:{tiny('clip')},modality=image", "cpu")
    inputs = {name: value[None] for name, value in encoder.prepare(pictures[0]).items()}
    model = transformers.CLIPVisionModel.from_pretrained(tiny("clip"))
    with torch.inference_mode():
        found = model(**inputs)
    name = f"{tiny('clip')},modality=image"
    expected = {
        "pooler": found.pooler_output[0],
        "cls": found.last_hidden_state[0, 0],
        "mean": found.last_hidden_state[0, 1:].mean(0),
    }
    for pooling, vector in expected.items():
        torch.testing.assert_close(vectors(f"{name},pooling={pooling}", pictures[:1])[0], vector, atol=1e-5, rtol=1e-4)


def test_a_mean_over_the_patches_of_a_picture_of_any_shape_leaves_the_padding_out(tiny: Tiny, pictures: list[Path]) -> None:
    if not hasattr(transformers, "Siglip2Model"):
        pytest.skip("this version of transformers has no SigLIP 2")
    encoder = load_encoder(f"transformers:{tiny('siglip2')},modality=image,pooling=mean", "cpu")
    inputs = encoder.prepare(pictures[1])
    own = int(inputs["pixel_attention_mask"].sum())
    assert own < 16
    with torch.inference_mode():
        model = transformers.Siglip2VisionModel.from_pretrained(tiny("siglip2"))
        states = model(**{name: value[None] for name, value in inputs.items()}).last_hidden_state[0]
    torch.testing.assert_close(encoder.encode([inputs])[0], states[:own].mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("saved", ["CLIPTextModelWithProjection", "CLIPTextModel"])
def test_a_tower_that_was_saved_alone_opens_without_an_option(tiny: Tiny, tmp_path: Path, saved: str) -> None:
    getattr(transformers, saved).from_pretrained(tiny("clip")).save_pretrained(tmp_path)
    tiny_models.save_tokenizer(tmp_path)
    pooling = "projection" if saved.endswith("Projection") else "pooler"
    expected = vectors(f"{tiny('clip')},modality=text,pooling={pooling}", TEXTS)
    torch.testing.assert_close(vectors(str(tmp_path), TEXTS), expected)


def test_claps_texts_have_length_1(tiny: Tiny) -> None:
    found = vectors(f"{tiny('clap')},modality=text", TEXTS)
    torch.testing.assert_close(found, normalize(found, dim=-1))


def test_a_text_tower_keeps_the_contract(tiny: Tiny) -> None:
    changed = f"transformers:{tiny('siglip', seed=1)},modality=text"
    check_encoder(f"transformers:{tiny('siglip')},modality=text", TEXTS, ["", " "], changed=changed)


def test_an_image_tower_keeps_the_contract(tiny: Tiny, pictures: list[Path], not_a_file_of_the_kind: Path) -> None:
    check_encoder(f"transformers:{tiny('clip')},modality=image", pictures, [not_a_file_of_the_kind])
