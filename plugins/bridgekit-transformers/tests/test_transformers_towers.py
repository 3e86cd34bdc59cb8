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


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2"])
def test_an_earlier_layer_of_an_image_tower_is_averaged_over_the_patches_beside_its_features(
    tiny: Tiny, pictures: list[Path], kind: str
) -> None:
    if kind == "siglip2" and not hasattr(transformers, "Siglip2Model"):
        pytest.skip("this version of transformers has no SigLIP 2")
    model = transformers.AutoModel.from_pretrained(tiny(kind)).vision_model
    encoder = load_encoder(f"transformers:{tiny(kind)},modality=image,layers=1+last", "cpu")
    lasts = vectors(f"{tiny(kind)},modality=image", pictures)
    for picture, last in zip(pictures, lasts, strict=True):
        prepared = encoder.prepare(picture)
        with torch.inference_mode():
            inputs = {name: value[None] for name, value in prepared.items()}
            states = model(**inputs, output_hidden_states=True).hidden_states[1][0]
        if kind == "siglip2":
            states = states[: int(prepared["pixel_attention_mask"].sum())]
        expected = torch.cat([states[1 if kind == "clip" else 0 :].mean(0), last])
        torch.testing.assert_close(encoder.encode([prepared])[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["clip", "clap", "siglip"])
def test_an_earlier_layer_of_a_text_tower_is_averaged_over_the_texts_own_tokens(tiny: Tiny, kind: str) -> None:
    model = transformers.AutoModel.from_pretrained(tiny(kind)).text_model
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny(kind))
    lasts = vectors(f"{tiny(kind)},modality=text", TEXTS)
    padding = {"padding": "max_length", "max_length": 24} if kind == "siglip" else {}
    expected = []
    for text, last in zip(TEXTS, lasts, strict=True):
        with torch.inference_mode():
            ids = tokenizer(text, return_tensors="pt", **padding)["input_ids"]
            states = model(ids, output_hidden_states=True).hidden_states[1][0]
        expected.append(torch.cat([states[: len(tokenizer(text)["input_ids"])].mean(0), last]))
    found = vectors(f"{tiny(kind)},modality=text,layers=1+last", TEXTS)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-4)


def test_the_tokens_of_a_text_that_is_padded_on_the_left_are_at_its_end(tiny: Tiny, tmp_path: Path) -> None:
    for file in tiny("siglip").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = tiny_models.read_json(tmp_path / "tokenizer_config.json")
    tiny_models.write_json(tmp_path / "tokenizer_config.json", settings | {"padding_side": "left"})
    model = transformers.AutoModel.from_pretrained(tmp_path).text_model
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    with torch.inference_mode():
        ids = tokenizer("a dog", padding="max_length", max_length=24, return_tensors="pt")["input_ids"]
        states = model(ids, output_hidden_states=True).hidden_states[1][0]
    own = len(tokenizer("a dog")["input_ids"])
    assert own < 24
    found = vectors(f"{tmp_path},modality=text,layers=1", ["a dog"])[0]
    torch.testing.assert_close(found, states[-own:].mean(0), atol=1e-5, rtol=1e-4)


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
