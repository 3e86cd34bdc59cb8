"""Which models this plugin takes: for each model type its modality, and what of the model's output can be the latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Head:
    """One way to get a vector out of a model.

    Arguments:
        model: the class in transformers that gives it; a class of one tower loads only that tower.
        output: the model's output that is the vector, or `cls` or `mean`: how to pool `last_hidden_state`.
        unit: scale it to length 1, as the model's own `get_*_features` does.
    """

    model: str
    output: str
    unit: bool = False


@dataclass(frozen=True)
class Family:
    """Models that are opened alike.

    Arguments:
        modality: what they encode.
        kind: which encoder of this plugin opens them: `text`, `whisper`, `waves`, `spectrograms` or `image`.
        heads: by the name that `pooling=` gives them, the default first.
        before: how many class tokens stand before an image's patches.
        fixed_length: texts are padded to the model's full length and not masked, as in its training.
    """

    modality: str
    kind: str
    heads: Mapping[str, Head] = field(default_factory=dict)
    before: int = 0
    fixed_length: bool = False


#: The options that each kind has besides `modality` and `trust_remote_code`.
OPTIONS: dict[str, tuple[str, ...]] = {
    "text": ("pooling", "prompt"),
    "whisper": ("layers", "window"),
    "waves": ("layers",),
    "spectrograms": ("pooling",),
    "image": ("pooling",),
}

#: Sentence-transformers' names of poolings; a text model of one tower has them all.
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

#: Models of two towers, of which the option `modality` picks one.
TOWERS: dict[str, tuple[Family, ...]] = {
    "clip": (_clip_text("CLIP"), _clip_image("CLIP")),
    "metaclip_2": (_clip_text("MetaClip2"), _clip_image("MetaClip2")),
    "siglip": (_siglip_text("Siglip"), _siglip_image("Siglip")),
    "siglip2": (_siglip_text("Siglip2"), _siglip_image("Siglip2")),
    "clap": (_CLAP_TEXT, _CLAP_AUDIO),
}

#: Models of one modality other than text, and single towers.
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
