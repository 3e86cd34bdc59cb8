"""The supported models: the modality of each model type, and which of its outputs can be the latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Head:
    """A way to get a vector from a model.

    Arguments:
        model: the transformers class to load; the class of a single tower loads only that tower.
        output: the name of the output vector, or `cls` or `mean` to pool `last_hidden_state`.
        unit: normalise it to unit length, as the model's own `get_*_features` does.
    """

    model: str
    output: str
    unit: bool = False


@dataclass(frozen=True)
class Family:
    """A family of models that are opened the same way.

    Arguments:
        modality: what they encode.
        kind: the plugin's encoder for them: `text`, `whisper`, `waves`, `spectrograms` or `image`.
        heads: value of `pooling=` to head, the default first.
        before: number of class tokens before an image's patches.
        fixed_length: pad texts to the model's full length without a mask, as in its training.
    """

    modality: str
    kind: str
    heads: Mapping[str, Head] = field(default_factory=dict)
    before: int = 0
    fixed_length: bool = False


#: The options of each kind, besides `modality` and `trust_remote_code`.
OPTIONS: dict[str, tuple[str, ...]] = {
    "text": ("pooling", "layers", "prompt"),
    "whisper": ("layers", "window"),
    "waves": ("layers",),
    "spectrograms": ("pooling",),
    "image": ("pooling", "layers"),
}

#: Poolings by their names in sentence-transformers. Single text models support all of them.
POOLINGS = ("mean", "cls", "max", "lasttoken", "mean_sqrt_len_tokens", "weightedmean")

TEXT = Family("text", "text")

_CLS = Head("AutoModel", "cls")
_MEAN = Head("AutoModel", "mean")
_POOLER = Head("AutoModel", "pooler_output")
_PATCHES = Family("image", "image", {"cls": _CLS, "mean": _MEAN, "pooler": _POOLER}, before=1)
_MAPS = Family("image", "image", {"pooler": _POOLER, "mean": _MEAN})


def _clip_text(prefix: str) -> Family:
    projection, pooler = Head(f"{prefix}TextModelWithProjection", "text_embeds"), Head(f"{prefix}TextModel", "pooler_output")
    return Family("text", "text", {"projection": projection, "pooler": pooler})


def _clip_image(prefix: str) -> Family:
    whole = f"{prefix}VisionModel"
    heads = {
        "projection": Head(f"{whole}WithProjection", "image_embeds"),
        "pooler": Head(whole, "pooler_output"),
        "cls": Head(whole, "cls"),
        "mean": Head(whole, "mean"),
    }
    return Family("image", "image", heads, before=1)


def _siglip_text(prefix: str) -> Family:
    return Family("text", "text", {"pooler": Head(f"{prefix}TextModel", "pooler_output")}, fixed_length=True)


def _siglip_image(prefix: str) -> Family:
    whole = f"{prefix}VisionModel"
    return Family("image", "image", {"pooler": Head(whole, "pooler_output"), "mean": Head(whole, "mean")})


_CLAP_TEXT = Family("text", "text", {"projection": Head("ClapTextModelWithProjection", "text_embeds", unit=True)})
_CLAP_AUDIO = Family(
    "audio",
    "spectrograms",
    {
        "projection": Head("ClapAudioModelWithProjection", "audio_embeds", unit=True),
        "pooler": Head("ClapAudioModel", "pooler_output"),
    },
)
_AST = Family("audio", "spectrograms", {"pooler": Head("ASTModel", "pooler_output"), "cls": Head("ASTModel", "cls")})
_WAVES = Family("audio", "waves")

#: Models with two towers, selected by the option `modality`.
TOWERS: dict[str, tuple[Family, ...]] = {
    "clip": (_clip_text("CLIP"), _clip_image("CLIP")),
    "metaclip_2": (_clip_text("MetaClip2"), _clip_image("MetaClip2")),
    "siglip": (_siglip_text("Siglip"), _siglip_image("Siglip")),
    "siglip2": (_siglip_text("Siglip2"), _siglip_image("Siglip2")),
    "clap": (_CLAP_TEXT, _CLAP_AUDIO),
}

#: Non-text models of one modality, and single towers.
FAMILIES: dict[str, Family] = {
    "whisper": Family("audio", "whisper"),
    "wav2vec2": _WAVES,
    "hubert": _WAVES,
    "wavlm": _WAVES,
    "data2vec-audio": _WAVES,
    "unispeech": _WAVES,
    "unispeech-sat": _WAVES,
    "audio-spectrogram-transformer": _AST,
    "clip_text_model": _clip_text("CLIP"),
    "clip_vision_model": _clip_image("CLIP"),
    "siglip_text_model": _siglip_text("Siglip"),
    "siglip_vision_model": _siglip_image("Siglip"),
    "siglip2_text_model": _siglip_text("Siglip2"),
    "siglip2_vision_model": _siglip_image("Siglip2"),
    "vit": _PATCHES,
    "deit": Family("image", "image", _PATCHES.heads, before=2),
    "beit": _PATCHES,
    "data2vec-vision": _PATCHES,
    "dinov2": _PATCHES,
    "dinov2_with_registers": _PATCHES,
    "dinov3_vit": _PATCHES,
    "vit_msn": Family("image", "image", {"cls": _CLS, "mean": _MEAN}, before=1),
    "ijepa": Family("image", "image", {"mean": _MEAN}),
    "dinov3_convnext": Family("image", "image", {"pooler": _POOLER}),
    "convnext": _MAPS,
    "convnextv2": _MAPS,
    "efficientnet": _MAPS,
    "regnet": _MAPS,
    "resnet": _MAPS,
    "swin": _MAPS,
    "swinv2": _MAPS,
}
