"""Builders of small models with random weights, saved as the hub has them: config, safetensors, tokenizer or preprocessor."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:äé漢"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TEXT = SMALL | {"vocab_size": len(VOCABULARY), "max_position_embeddings": 48, "pad_token_id": 0}
WAVES = SMALL | {
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 8, 4),
    "conv_stride": (8, 8, 5),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 32,
}
PATCHES = SMALL | {"image_size": 32, "patch_size": 8}
WAVE_KINDS = {
    "wav2vec2-group": ("Wav2Vec2", {"feat_extract_norm": "group"}),
    "wav2vec2-layer": ("Wav2Vec2", {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}),
    "hubert": ("Hubert", {"feat_extract_norm": "layer", "do_stable_layer_norm": True}),
    "wavlm": ("WavLM", {"feat_extract_norm": "layer", "do_stable_layer_norm": True}),
    "data2vec-audio": ("Data2VecAudio", {}),
    "unispeech-sat": ("UniSpeechSat", {"feat_extract_norm": "group"}),
}
IMAGE_KINDS = {
    "vit": ("ViT", PATCHES),
    "deit": ("Deit" if not hasattr(transformers, "DeiTModel") else "DeiT", PATCHES),
    "dinov2": ("Dinov2", PATCHES),
    "dinov2-registers": ("Dinov2WithRegisters", PATCHES | {"num_register_tokens": 3}),
    "dinov3": ("DINOv3ViT", PATCHES | {"num_register_tokens": 4}),
    "convnext": ("ConvNext", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}),
    "resnet": ("ResNet", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "embedding_size": 8}),
}


def build(kind: str, folder: Path, seed: int = 0) -> None:
    """Write a small model of that kind into an empty folder."""
    torch.manual_seed(seed)
    if kind in WAVE_KINDS:
        name, settings = WAVE_KINDS[kind]
        save(_class(name, "Model")(_class(name, "Config")(**(WAVES | settings))), folder)
        transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder)
    elif kind in IMAGE_KINDS:
        name, settings = IMAGE_KINDS[kind]
        save(_class(name, "Model")(_class(name, "Config")(**settings)), folder)
        processor = "DINOv3ViTImageProcessor" if kind == "dinov3" else "ViTImageProcessor"
        size = {"height": 32, "width": 32}
        # Written by hand, since transformers 4 and 5 name the same preprocessing differently.
        preprocessor = {"image_processor_type": processor + ("Fast" if kind == "dinov3" else ""), "size": size}
        preprocessor |= {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 2}
        preprocessor |= {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
        write_json(folder / "preprocessor_config.json", preprocessor)
    else:
        BUILDERS[kind](folder)


def _bert(folder: Path) -> None:
    save(transformers.BertModel(transformers.BertConfig(**TEXT)), folder)
    save_tokenizer(folder)


def _roberta(folder: Path) -> None:
    """Positions are counted from the padding's, so 50 of them are enough for 48 tokens, less one."""
    settings = TEXT | {"max_position_embeddings": 50, "pad_token_id": 1}
    save(transformers.RobertaModel(transformers.RobertaConfig(**settings)), folder)
    save_tokenizer(folder, limit=None)


def _bert_sentences(folder: Path, modules: list[str], pooling: dict[str, Any], whole: dict[str, Any] | None = None) -> None:
    """A BERT with the files that sentence-transformers writes."""
    _bert(folder)
    paths = ["", *(f"{place}_{name}" for place, name in enumerate(modules, start=1))]
    write_json(
        folder / "modules.json",
        [
            {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{name}"}
            for place, (name, path) in enumerate(zip(["Transformer", *modules], paths, strict=True))
        ],
    )
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 20, "do_lower_case": False})
    (folder / "1_Pooling").mkdir()
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 32} | pooling)
    if whole:
        write_json(folder / "config_sentence_transformers.json", whole)


def _bge(folder: Path) -> None:
    _bert_sentences(folder, ["Pooling", "Normalize"], {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})


def _e5(folder: Path) -> None:
    prompts = {"query": "query: ", "passage": "passage: "}
    whole = {"prompts": prompts, "default_prompt_name": "passage"}
    _bert_sentences(folder, ["Pooling", "Normalize"], {"pooling_mode": "mean", "include_prompt": True}, whole)


def _dense(folder: Path) -> None:
    flags = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}
    _bert_sentences(folder, ["Pooling", "Dense", "Normalize"], flags)
    (folder / "2_Dense").mkdir()
    config = {"in_features": 96, "out_features": 12, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}
    write_json(folder / "2_Dense" / "config.json", config)
    weights = {"linear.weight": torch.randn(12, 96) / 5, "linear.bias": torch.randn(12)}
    save_file(weights, folder / "2_Dense" / "model.safetensors")


def _llama(folder: Path) -> None:
    save(transformers.LlamaModel(transformers.LlamaConfig(**TEXT)), folder)
    save_tokenizer(folder, template="$A [SEP]")


def _t5(folder: Path) -> None:
    settings = {"vocab_size": len(VOCABULARY), "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
    save(transformers.T5Model(transformers.T5Config(**settings, pad_token_id=0, decoder_start_token_id=0)), folder)
    save_tokenizer(folder, template="$A [SEP]")


def _byt5(folder: Path) -> None:
    """A T5 that reads bytes, with a tokenizer written in Python."""
    settings = {"vocab_size": 384, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
    save(transformers.T5Model(transformers.T5Config(**settings, pad_token_id=0, decoder_start_token_id=0)), folder)
    transformers.ByT5Tokenizer(model_max_length=48).save_pretrained(folder)


def _fnet(folder: Path) -> None:
    """A model without an attention mask: every token is mixed with every position."""
    settings = {"vocab_size": len(VOCABULARY), "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    save(transformers.FNetModel(transformers.FNetConfig(**settings, max_position_embeddings=48, pad_token_id=0)), folder)
    save_tokenizer(folder)


def _bart(folder: Path) -> None:
    settings = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config = transformers.BartConfig(
        **settings, vocab_size=len(VOCABULARY), encoder_attention_heads=2, decoder_attention_heads=2
    )
    save(transformers.BartModel(config), folder)
    save_tokenizer(folder)


def _clip(folder: Path) -> None:
    text = TEXT | {"max_position_embeddings": 24, "eos_token_id": 3, "bos_token_id": 2, "projection_dim": 20}
    config = transformers.CLIPConfig(text_config=text, vision_config=PATCHES | {"projection_dim": 20}, projection_dim=20)
    save(transformers.CLIPModel(config), folder)
    save_tokenizer(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    write_json(
        folder / "preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True} | size
    )


def _siglip(folder: Path) -> None:
    text = TEXT | {"max_position_embeddings": 24, "pad_token_id": 4, "projection_size": 32}
    save(transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=PATCHES)), folder)
    save_tokenizer(folder, template="$A [SEP]", limit=24)
    size = {"size": {"height": 32, "width": 32}}
    write_json(folder / "preprocessor_config.json", {"image_processor_type": "SiglipImageProcessor"} | size)


def _siglip2(folder: Path) -> None:
    """Of any shape of picture: a list of at most 16 patches and a mask."""
    text = TEXT | {"max_position_embeddings": 24, "projection_size": 32}
    vision = SMALL | {"num_patches": 16, "patch_size": 8}
    save(transformers.Siglip2Model(transformers.Siglip2Config(text_config=text, vision_config=vision)), folder)
    save_tokenizer(folder, template="$A [SEP]", limit=24)
    preprocessor = {"image_processor_type": "Siglip2ImageProcessor", "patch_size": 8, "max_num_patches": 16}
    write_json(folder / "preprocessor_config.json", preprocessor)


def _ast(folder: Path) -> None:
    config = transformers.ASTConfig(**SMALL, max_length=128, num_mel_bins=32, patch_size=16)
    save(transformers.ASTModel(config), folder)
    transformers.ASTFeatureExtractor(num_mel_bins=32, max_length=128).save_pretrained(folder)


def _clap(folder: Path, *, fused: bool = False) -> None:
    text = TEXT | {"max_position_embeddings": 50, "pad_token_id": 1}
    audio = {
        "patch_embeds_hidden_size": 8,
        "hidden_size": 64,
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 1, 2, 2],
        "enable_fusion": fused,
    }
    config = transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=20)
    save(transformers.ClapModel(config), folder)
    save_tokenizer(folder, limit=40)
    truncation = "fusion" if fused else "rand_trunc"
    transformers.ClapFeatureExtractor(truncation=truncation, max_length_s=2).save_pretrained(folder)


def _whisper(folder: Path) -> None:
    config = transformers.WhisperConfig(
        d_model=32,
        encoder_layers=3,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        vocab_size=60,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    save(transformers.WhisperForConditionalGeneration(config), folder)
    transformers.WhisperFeatureExtractor().save_pretrained(folder)


def _detr(folder: Path) -> None:
    write_json(folder / "config.json", {"model_type": "detr"})


BUILDERS = {
    "bert": _bert,
    "roberta": _roberta,
    "bge": _bge,
    "e5": _e5,
    "dense": _dense,
    "llama": _llama,
    "t5": _t5,
    "byt5": _byt5,
    "fnet": _fnet,
    "bart": _bart,
    "clip": _clip,
    "siglip": _siglip,
    "siglip2": _siglip2,
    "ast": _ast,
    "clap": _clap,
    "clap-fused": lambda folder: _clap(folder, fused=True),
    "whisper": _whisper,
    "detr": _detr,
}


def save(model: Any, folder: Path) -> None:
    """Save a model in safetensors, each of its weights moved, so that no bias is zero and no two items look alike to it."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.15)
    model.eval().save_pretrained(folder)


def save_tokenizer(folder: Path, template: str = "[CLS] $A [SEP]", limit: int | None = 48) -> None:
    """A WordPiece tokenizer of single letters."""
    tokenizer = Tokenizer(models.WordPiece({word: place for place, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    limits = {} if limit is None else {"model_max_length": limit}
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **limits).save_pretrained(folder)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def write_sound(path: Path, seconds: float, rate: int, seed: int) -> Path:
    """Gliding harmonics that swell and fade, and noise."""
    time = np.arange(max(1, round(seconds * rate))) / rate
    random = np.random.default_rng(seed)
    phase = 2 * np.pi * np.cumsum(110 * (seed + 1) + 30 * np.sin(4 * time)) / rate
    wave = 0.1 * np.sin(phase) * (1 + np.sin(5 * time)) + 0.03 * random.standard_normal(len(time))
    soundfile.write(path, wave.astype(np.float32), rate, subtype="FLOAT")
    return path


def write_picture(path: Path, shape: tuple[int, int], seed: int) -> Path:
    """Blurred noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(shape, Image.Resampling.BICUBIC).save(path)
    return path


def _class(name: str, what: str) -> Any:
    return getattr(transformers, name + what)
