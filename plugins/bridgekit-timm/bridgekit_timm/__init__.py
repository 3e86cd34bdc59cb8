"""Every timm image model as an encoder: `timm:resnet50`, `timm:org/model`, `timm:./folder`, `timm:resnet50,checkpoint=...`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bridgekit.hookspecs import EncoderProvider, hookimpl

if TYPE_CHECKING:
    from bridgekit.encoders import Encoder

#: Some small models of each kind to start with; `timm.list_pretrained()` lists all.
MODELS = (
    "vit_small_patch14_dinov2.lvd142m,size=224",
    "vit_base_patch32_clip_224.openai",
    "vit_base_patch16_siglip_224.webli",
    "convnext_tiny.fb_in22k",
    "tf_efficientnet_lite0.in1k",
    "mobilenetv4_conv_small.e2400_r224_in1k",
)


def open_encoder(model: str, device: str) -> Encoder:
    """Open a pre-trained timm model on a torch device.

    Raises:
        PluginError: there is no such model, or its weights cannot be found, downloaded or loaded.
    """
    # Imported here, since timm imports torch and torchvision, which `bridgekit --help` does not need.
    from bridgekit_timm.image import ImageEncoder

    return ImageEncoder(model, device)


@hookimpl
def encoder_providers() -> Sequence[EncoderProvider]:
    """`timm:MODEL` for every image model of timm. None is a default: the starter kit has that."""
    return [EncoderProvider(name="timm", modalities=("image",), open=open_encoder, models=lambda: MODELS)]
