"""Tiny pipelines of the stock diffusers classes, built in memory from configurations with random weights.

They have learned nothing: a picture from one of them is coloured noise that depends on its conditioning. What they prove is
that arguments, shapes, dtypes, guidance and batches are those of the real classes. Tokenizers are built here too, so nothing is
downloaded, and every pipeline survives `save_pretrained` and `DiffusionPipeline.from_pretrained` (but for a loaded IP-Adapter,
which diffusers does not save). Pictures are 32 or 64 pixels wide if told so; PixArt's are 256 by default.
"""

from __future__ import annotations

import inspect
import string
from typing import Any

import torch

#: Width of the text encoders and of what the denoisers attend to.
WIDTH = 32

#: Width of the CLIP image embeddings. Not that of the texts, so that a mix-up is an error.
IMAGE_WIDTH = 24

CHARACTERS = string.ascii_lowercase + string.digits + ".,:;!?'\"-\n"

#: Tokens of the chat format that Qwen models are prompted in.
CHAT_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def stable_diffusion() -> Any:
    """Stable Diffusion 1: one CLIP text encoder, a sequence of 77."""
    from diffusers import StableDiffusionPipeline

    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    return quiet(
        StableDiffusionPipeline(
            unet=unet(),
            vae=autoencoder(),
            scheduler=ddim(),
            tokenizer=tokenizer,
            text_encoder=clip_text(tokenizer),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def sd_ip_adapter(*, plus: bool = False) -> Any:
    """Stable Diffusion with an image encoder and an IP-Adapter: one on pooled embeddings, or a "plus" one on hidden states."""
    pipeline = stable_diffusion()
    pipeline.register_modules(image_encoder=clip_vision(), feature_extractor=picture_processor())
    pipeline.load_ip_adapter(ip_adapter_weights(pipeline.unet, plus=plus), subfolder="", weight_name="")
    return pipeline


def sdxl() -> Any:
    """Stable Diffusion XL: two CLIP text encoders, a pooled vector, and a negative of zeros."""
    from diffusers import StableDiffusionXLPipeline

    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    return quiet(
        StableDiffusionXLPipeline(
            unet=unet(
                cross_attention_dim=2 * WIDTH,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + WIDTH,
            ),
            vae=autoencoder(),
            scheduler=ddim(),
            tokenizer=tokenizer,
            tokenizer_2=clip_tokenizer(),
            text_encoder=clip_text(tokenizer),
            text_encoder_2=clip_text(tokenizer, projected=True),
        )
    )


def sd3() -> Any:
    """Stable Diffusion 3: two CLIP text encoders and a T5, one after the other in one sequence, and a pooled vector."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    # Two CLIPs side by side are padded to the width of the T5.
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
    )
    return quiet(
        StableDiffusion3Pipeline(
            transformer=transformer,
            vae=autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            tokenizer=tokenizer,
            tokenizer_2=clip_tokenizer(),
            tokenizer_3=t5_tokenizer(),
            text_encoder=clip_text(tokenizer, projected=True),
            text_encoder_2=clip_text(tokenizer, projected=True),
            text_encoder_3=t5(2 * WIDTH),
        )
    )


def flux() -> Any:
    """Flux: a T5 sequence without a mask, a pooled CLIP vector, guidance embedded in the model."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    return quiet(
        FluxPipeline(
            transformer=FluxTransformer2DModel(
                patch_size=1,
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=WIDTH,
                pooled_projection_dim=WIDTH,
                guidance_embeds=True,
                axes_dims_rope=(4, 4, 8),
            ),
            vae=autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            tokenizer=tokenizer,
            tokenizer_2=t5_tokenizer(),
            text_encoder=clip_text(tokenizer),
            text_encoder_2=t5(),
        )
    )


def flux_ip_adapter() -> Any:
    """Flux with an image encoder and an IP-Adapter, which takes its negatives apart."""
    pipeline = flux()
    pipeline.register_modules(image_encoder=clip_vision(), feature_extractor=picture_processor())
    out = pipeline.transformer.inner_dim
    torch.manual_seed(1)
    weights = {f"0.to_{part}_ip.weight": torch.randn(out, WIDTH) / WIDTH**0.5 for part in "kv"}
    weights |= {f"0.to_{part}_ip.bias": torch.zeros(out) for part in "kv"}
    pipeline.load_ip_adapter({"image_proj": plain_projection(), "ip_adapter": weights}, weight_name="")
    return pipeline


def pixart() -> Any:
    """PixArt-alpha: a T5 sequence of 120 with an attention mask."""
    from diffusers import PixArtAlphaPipeline, PixArtTransformer2DModel

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return quiet(
        PixArtAlphaPipeline(
            transformer=PixArtTransformer2DModel(
                sample_size=32,  # the pipeline knows bins of pictures for 32, 64 and 128 only
                num_layers=1,
                patch_size=2,
                attention_head_dim=8,
                num_attention_heads=4,
                caption_channels=WIDTH,
                in_channels=4,
                cross_attention_dim=32,
                out_channels=8,
                norm_type="ada_norm_single",
                use_additional_conditions=False,
            ),
            vae=autoencoder(block_out_channels=(8,) * 4, **blocks),
            scheduler=ddim(),
            tokenizer=t5_tokenizer(),
            text_encoder=t5(),
        )
    )


def sana() -> Any:
    """Sana: a Gemma sequence with an attention mask, prefixed by instructions that only a call of the pipeline names."""
    from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(0)
    instructions = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    tokenizer = gemma_tokenizer("\n".join(instructions))
    return quiet(
        SanaPipeline(
            transformer=SanaTransformer2DModel(
                patch_size=1,
                in_channels=4,
                out_channels=4,
                num_layers=1,
                num_attention_heads=2,
                attention_head_dim=8,
                num_cross_attention_heads=2,
                cross_attention_head_dim=8,
                cross_attention_dim=16,
                caption_channels=WIDTH,
                sample_size=16,
            ),
            vae=AutoencoderDC(
                in_channels=3,
                latent_channels=4,
                attention_head_dim=2,
                encoder_block_types=("ResBlock", "EfficientViTBlock"),
                decoder_block_types=("ResBlock", "EfficientViTBlock"),
                encoder_block_out_channels=(8, 8),
                decoder_block_out_channels=(8, 8),
                encoder_qkv_multiscales=((), (5,)),
                decoder_qkv_multiscales=((), (5,)),
                encoder_layers_per_block=(1, 1),
                decoder_layers_per_block=(1, 1),
                downsample_block_type="conv",
                upsample_block_type="interpolate",
                decoder_norm_types="rms_norm",
                decoder_act_fns="silu",
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            tokenizer=tokenizer,
            text_encoder=Gemma2Model(
                Gemma2Config(
                    vocab_size=len(tokenizer),
                    hidden_size=WIDTH,
                    intermediate_size=32,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    num_key_value_heads=2,
                    head_dim=8,
                )
            ),
        )
    )


def z_image() -> Any:
    """Z-Image: a Qwen3 encoding handed over as a list of sequences, each as long as its caption."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 32, 32],
    )
    with torch.no_grad():  # the class leaves its two padding tokens uninitialised
        transformer.x_pad_token.fill_(0.5)
        transformer.cap_pad_token.fill_(0.5)
    return quiet(
        ZImagePipeline(
            transformer=transformer,
            vae=autoencoder(shift_factor=0.1, scaling_factor=0.4),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            tokenizer=tokenizer,
            text_encoder=Qwen3Model(
                Qwen3Config(
                    vocab_size=len(tokenizer),
                    hidden_size=WIDTH,
                    intermediate_size=32,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    num_key_value_heads=2,
                    head_dim=8,
                )
            ),
        )
    )


def qwen_image() -> Any:
    """Qwen-Image: a Qwen2.5-VL sequence whose mask is left out when all captions of a batch are equally long."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_scaling": {"mrope_section": [2, 3, 3], "rope_type": "default", "type": "default"},
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH},
    )
    return quiet(
        QwenImagePipeline(
            transformer=QwenImageTransformer2DModel(
                patch_size=2,
                in_channels=16,
                out_channels=4,
                num_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=WIDTH,
                axes_dims_rope=(8, 4, 4),
            ),
            vae=AutoencoderKLQwenImage(
                base_dim=8,
                z_dim=4,
                dim_mult=[1, 2, 2],
                num_res_blocks=1,
                temperal_downsample=[False, True],
                latents_mean=[0.0] * 4,
                latents_std=[1.0] * 4,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            tokenizer=tokenizer,
            text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        )
    )


def kandinsky22() -> Any:
    """The decoder of Kandinsky 2.2: image embeddings in, and no encoder of any kind to make them."""
    from diffusers import KandinskyV22Pipeline, UNet2DConditionModel, VQModel

    torch.manual_seed(0)
    return quiet(
        KandinskyV22Pipeline(
            unet=UNet2DConditionModel(
                sample_size=16,
                in_channels=4,
                out_channels=8,  # mean and variance
                addition_embed_type="image",
                down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
                up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
                mid_block_type="UNetMidBlock2DSimpleCrossAttn",
                block_out_channels=(16, 32),
                layers_per_block=1,
                norm_num_groups=8,
                encoder_hid_dim=IMAGE_WIDTH,
                encoder_hid_dim_type="image_proj",
                cross_attention_dim=32,
                attention_head_dim=8,
                resnet_time_scale_shift="scale_shift",
            ),
            movq=VQModel(
                block_out_channels=(32, 32),
                down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
                up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
                latent_channels=4,
                layers_per_block=1,
                norm_num_groups=8,
                norm_type="spatial",
                num_vq_embeddings=12,
                vq_embed_dim=4,
            ),
            scheduler=ddim(),
        )
    )


def stable_unclip() -> Any:
    """Stable unCLIP from texts: a prior of its own turns the prompt into an image embedding inside the call."""
    from diffusers import DDPMScheduler, PriorTransformer, StableUnCLIPPipeline, UnCLIPScheduler
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    return quiet(
        StableUnCLIPPipeline(
            prior_tokenizer=clip_tokenizer(),
            prior_text_encoder=clip_text(tokenizer, projected=True),
            prior=PriorTransformer(
                num_attention_heads=2, attention_head_dim=8, embedding_dim=WIDTH, num_layers=1, additional_embeddings=4
            ),
            prior_scheduler=UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample"),
            image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=WIDTH),
            image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
            tokenizer=tokenizer,
            text_encoder=clip_text(tokenizer),
            unet=unet(class_embed_type="projection", projection_class_embeddings_input_dim=2 * WIDTH),
            scheduler=ddim(),
            vae=autoencoder(),
        )
    )


def stable_unclip_img2img() -> Any:
    """Stable unCLIP from pictures: image embeddings, noised by the pipeline, and a prompt beside them."""
    from diffusers import DDPMScheduler, StableUnCLIPImg2ImgPipeline
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    return quiet(
        StableUnCLIPImg2ImgPipeline(
            feature_extractor=picture_processor(),
            image_encoder=clip_vision(),
            image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=IMAGE_WIDTH),
            image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
            tokenizer=tokenizer,
            text_encoder=clip_text(tokenizer),
            unet=unet(class_embed_type="projection", projection_class_embeddings_input_dim=2 * IMAGE_WIDTH),
            scheduler=ddim(),
            vae=autoencoder(),
        )
    )


def unconditional() -> Any:
    """A pipeline that takes nothing at all: pictures out of noise."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    model = UNet2DModel(sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=8, **blocks)
    return quiet(DDPMPipeline(unet=model, scheduler=DDPMScheduler()))


def quiet(pipeline: Any) -> Any:
    """No progress bars, and no dropout in what was just built."""
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipeline


def unet(**changes: Any) -> Any:
    from diffusers import UNet2DConditionModel

    config = {
        "sample_size": 16,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "cross_attention_dim": WIDTH,
    }
    return UNet2DConditionModel(**(config | changes))


def autoencoder(**changes: Any) -> Any:
    from diffusers import AutoencoderKL

    config = {
        "sample_size": 32,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 8,
    }
    return AutoencoderKL(**(config | changes))


def ddim() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1)


def clip_text(tokenizer: Any, *, projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def clip_vision() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        projection_dim=IMAGE_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    return CLIPVisionModelWithProjection(config).eval()


def picture_processor() -> Any:
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def t5(width: int = WIDTH) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return T5EncoderModel(config)


def clip_tokenizer() -> Any:
    """Every character is a token, once within a word and once at its end, as in CLIP's vocabulary before the first merge."""
    from transformers import CLIPTokenizer

    tokens = [*CHARACTERS, *(f"{char}</w>" for char in CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[], model_max_length=77)


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [("▁", -2.0), *((char, -3.0) for char in CHARACTERS)]
    return T5Tokenizer(vocab=[*special, *pieces], extra_ids=0, model_max_length=512)


def gemma_tokenizer(text: str) -> Any:
    """Byte pairs that make a certain text short: Sana's instructions, a thousand characters before every caption."""
    from transformers import GemmaTokenizer

    return GemmaTokenizer(model_max_length=4096).train_new_from_iterator([text, CHARACTERS], vocab_size=400)


def qwen_tokenizer() -> Any:
    from transformers import Qwen2Tokenizer

    # Byte-level vocabularies write a space as Ġ and a line feed as Ċ.
    tokens = [*CHAT_TOKENS, *string.ascii_letters, *string.digits, *string.punctuation, "Ġ", "Ċ"]
    tokenizer = Qwen2Tokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[], model_max_length=2048)
    tokenizer.add_special_tokens({"additional_special_tokens": CHAT_TOKENS[1:]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def ip_adapter_weights(model: Any, *, plus: bool) -> dict[str, dict[str, torch.Tensor]]:
    """Random weights under the names that a published IP-Adapter of this UNet would have."""
    torch.manual_seed(1)
    layers: dict[str, torch.Tensor] = {}
    crossing = [name for name in model.attn_processors if "attn2" in name]
    for number, name in enumerate(crossing):
        out = model.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for part in ("k", "v"):  # published keys count self-attentions too, so cross-attentions are odd
            layers[f"{2 * number + 1}.to_{part}_ip.weight"] = torch.randn(out, WIDTH) / WIDTH**0.5
    return {"image_proj": plus_projection() if plus else plain_projection(), "ip_adapter": layers}


def plain_projection() -> dict[str, torch.Tensor]:
    """From a pooled embedding to four tokens."""
    return {
        "proj.weight": torch.randn(4 * WIDTH, IMAGE_WIDTH) / IMAGE_WIDTH**0.5,
        "proj.bias": torch.zeros(4 * WIDTH),
        "norm.weight": torch.ones(WIDTH),
        "norm.bias": torch.zeros(WIDTH),
    }


def plus_projection() -> dict[str, torch.Tensor]:
    """From hidden states to four tokens, through the four perceiver layers that the class has, of one head of 64 channels."""
    width, head = WIDTH, 64
    shapes = {"latents": (1, 4, width), "proj_in.weight": (width, width), "proj_out.weight": (width, width)}
    norms = ["norm_out"]
    for layer in range(4):
        attention, feed_forward = f"layers.{layer}.0", f"layers.{layer}.1"
        shapes |= {f"{attention}.to_q.weight": (head, width), f"{attention}.to_kv.weight": (2 * head, width)}
        shapes |= {f"{attention}.to_out.weight": (width, head)}
        shapes |= {f"{feed_forward}.1.weight": (4 * width, width), f"{feed_forward}.3.weight": (width, 4 * width)}
        norms += [f"{attention}.norm1", f"{attention}.norm2", f"{feed_forward}.0"]
    weights = {name: torch.randn(shape) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    weights |= {f"{name}.weight": torch.ones(width) for name in norms}
    return weights | {f"{name}.bias": torch.zeros(width) for name in (*norms, "proj_in", "proj_out")}
