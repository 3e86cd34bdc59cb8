"""What a pipeline takes in place of a prompt, found out from tiny pipelines of the stock classes with random weights."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from bridgekit.diffusion.models import find_conditionings
from bridgekit.diffusion.pipeline import BATCH_SIZE, guidance_argument
from bridgekit.encoders import Item
from bridgekit.errors import BridgekitError, ItemError
from bridgekit.image_models import Conditioning
from bridgekit.media import read_image
from tests import pipelines

pytest.importorskip("diffusers")

CAPTIONS = ["a red cat", "two tall green trees by a lake", "dog"]

#: What each pipeline's text encoding consists of: the shape behind n, with L where it is the longest caption's.
PROMPTED: dict[str, dict[str, tuple[int | str, ...]]] = {
    "stable_diffusion": {"prompt_embeds": (77, 32)},
    "sdxl": {"prompt_embeds": (77, 64), "pooled_prompt_embeds": (32,)},
    "sd3": {"prompt_embeds": (77 + 256, 64), "pooled_prompt_embeds": (64,)},
    "flux": {"prompt_embeds": (512, 32), "pooled_prompt_embeds": (32,)},
    "pixart": {"prompt_embeds": ("L", 32), "prompt_attention_mask": ("L",)},
    "sana": {"prompt_embeds": ("L", 32), "prompt_attention_mask": ("L",)},
    "z_image": {"prompt_embeds": ("L", 32), "prompt_embeds_mask": ("L",)},
    "qwen_image": {"prompt_embeds": ("L", 32), "prompt_embeds_mask": ("L",)},
}

#: With a mask the padding is cut, which moves the sums in an attention by a rounding error or two.
CLOSE = {"rtol": 0.0, "atol": 5e-4}


@pytest.fixture(params=PROMPTED)
def prompted(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


@pytest.fixture(params=["kandinsky22", "stable_unclip_img2img", "sd_ip_adapter", "sd_ip_adapter_plus", "flux_ip_adapter"])
def pictured(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


def build(name: str) -> Any:
    pipeline = pipelines.sd_ip_adapter(plus=True) if name == "sd_ip_adapter_plus" else getattr(pipelines, name)()
    pipeline.bridgekit_name = name
    return pipeline


def first(pipeline: Any) -> Conditioning:
    return find_conditionings(pipeline)[0]


def draw(
    pipeline: Any, arguments: Mapping[str, Any], *, guided: bool, seeds: Sequence[int] = (0,), output: str = "latent"
) -> npt.NDArray[np.float32]:
    """n pictures in two steps: latents, unless pixels are wanted, for an untrained decoder blows rounding errors up."""
    scale = guidance_argument(pipeline)
    options: dict[str, Any] = {scale: 4.0 if guided else 0.0} if scale else {}
    if "use_resolution_binning" in inspect.signature(pipeline.__call__).parameters:
        options["use_resolution_binning"] = False  # or everything is drawn in hundreds of pixels first
    made = pipeline(
        **arguments,
        **options,
        height=64,
        width=64,
        num_inference_steps=2,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type=output,
    ).images
    return np.asarray(made.float() if isinstance(made, Tensor) else made)


def own_latents(pipeline: Any, captions: Sequence[str], *, guided: bool) -> npt.NDArray[np.float32]:
    """The same for captions that the pipeline encodes itself."""
    asked: dict[str, Any] = {"prompt": list(captions)}
    if guidance_argument(pipeline) == "true_cfg_scale":  # these have no negative prompt unless one is named
        asked["negative_prompt"] = [""] * len(captions)
    return draw(pipeline, asked, guided=guided, seeds=range(len(captions)))


def pictures(n: int) -> list[Image.Image]:
    return [Image.effect_noise((40, 50), 60 + 20 * k).convert("RGB").rotate(30 * k) for k in range(n)]


def embeddings(pipeline: Any, n: int) -> dict[str, Tensor]:
    """Conditioning tensors of n pictures: the pipeline's own where it can encode, and else random ones."""
    conditioning = first(pipeline)
    if pipeline.bridgekit_name == "kandinsky22":
        return {"image_embeds": torch.randn(n, pipelines.IMAGE_WIDTH, generator=torch.Generator().manual_seed(0))}
    return conditioning.encode(pictures(n))


# ---- texts


def test_a_pipeline_gives_its_own_text_encoding_under_the_names_of_its_arguments(prompted: Any) -> None:
    [conditioning] = find_conditionings(prompted)
    assert (conditioning.kind, conditioning.made_of) == ("prompt_embeds", "text")
    tensors = conditioning.encode(CAPTIONS)
    expected = PROMPTED[prompted.bridgekit_name]
    longest = max((tensor.shape[1] for name, tensor in tensors.items() if "mask" in name), default=0)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: (3, *(longest if size == "L" else size for size in shape)) for name, shape in expected.items()
    }
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.bool if "mask" in name else torch.float32)
        assert tensor.device.type == "cpu"
        assert not tensor.is_inference()  # it is to be a target of training


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
def test_its_own_encoding_handed_back_gives_the_picture_of_the_prompt(prompted: Any, guided: bool) -> None:
    captions = CAPTIONS[:2]
    conditioning = first(prompted)
    arguments = conditioning.arguments(conditioning.encode(captions), guided=guided)
    assert "prompt" not in arguments
    assert any(name.startswith("negative_") and name.endswith("embeds") for name in arguments) == guided
    drawn = draw(prompted, arguments, guided=guided, seeds=(0, 1))
    np.testing.assert_allclose(drawn, own_latents(prompted, captions, guided=guided), **CLOSE)
    other = conditioning.arguments(conditioning.encode(["a blue whale", "x"]), guided=guided)
    assert not np.allclose(drawn, draw(prompted, other, guided=guided, seeds=(0, 1)), **CLOSE)


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("n", [1, 3])
def test_texts_become_pictures(prompted: Any, n: int, guided: bool) -> None:
    conditioning = first(prompted)
    arguments = conditioning.arguments(conditioning.encode(CAPTIONS[:n]), guided=guided)
    drawn = draw(prompted, arguments, guided=guided, seeds=range(n), output="np")
    assert drawn.shape == (n, 64, 64, 3)
    assert 0 <= drawn.min() < drawn.max() <= 1


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
def test_a_batch_of_texts_gives_the_pictures_of_each_alone(prompted: Any, guided: bool) -> None:
    conditioning = first(prompted)
    tensors = conditioning.encode(CAPTIONS)
    together = draw(prompted, conditioning.arguments(tensors, guided=guided), guided=guided, seeds=(5, 6, 7))
    for row in range(3):
        alone = conditioning.arguments({name: tensor[row : row + 1] for name, tensor in tensors.items()}, guided=guided)
        np.testing.assert_allclose(draw(prompted, alone, guided=guided, seeds=(5 + row,))[0], together[row], **CLOSE)


def test_half_precision_gives_and_takes_the_same_names_in_its_own_dtype(prompted: Any) -> None:
    prompted.to(torch.bfloat16)
    conditioning = first(prompted)
    tensors = conditioning.encode(CAPTIONS[:2])
    assert {tensor.dtype for tensor in tensors.values()} <= {torch.float32, torch.bool}
    arguments = conditioning.arguments(tensors, guided=True)
    floats = [tensor for value in arguments.values() if value is not None for tensor in value if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in floats} == {torch.bfloat16}
    drawn = draw(prompted, arguments, guided=True, seeds=(0, 1))
    np.testing.assert_allclose(drawn, own_latents(prompted, CAPTIONS[:2], guided=True), rtol=0, atol=0.05)


def test_a_pipeline_loaded_from_its_folder_encodes_alike(prompted: Any, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    prompted.save_pretrained(tmp_path)
    again = first(DiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)).encode(CAPTIONS)
    for name, tensor in first(prompted).encode(CAPTIONS).items():
        torch.testing.assert_close(again[name], tensor)


@pytest.mark.parametrize("length", [3, 9, 90])
def test_sequences_of_any_length_can_be_handed_over(prompted: Any, length: int) -> None:
    conditioning = first(prompted)
    made = {
        name: torch.ones(2, length, dtype=torch.bool) if "mask" in name else torch.randn(2, *shape)
        for name, shape in (
            (name, (length, *tensor.shape[2:]) if tensor.ndim == 3 else tensor.shape[1:])
            for name, tensor in conditioning.encode(CAPTIONS).items()
        )
    }
    for guided in (True, False):
        assert draw(prompted, conditioning.arguments(made, guided=guided), guided=guided, seeds=(0, 1)).shape[0] == 2


@pytest.mark.parametrize("name", ["pixart", "sana"])
def test_padding_is_cut_down_to_the_longest_caption(name: str) -> None:
    conditioning = first(build(name))
    short, both = conditioning.encode(["dog"]), conditioning.encode(["dog", CAPTIONS[1]])
    assert 3 < short["prompt_embeds"].shape[1] < 10
    assert short["prompt_embeds"].shape[1] < both["prompt_embeds"].shape[1] < 50
    lengths = both["prompt_attention_mask"].sum(1)
    assert lengths.tolist() == [short["prompt_embeds"].shape[1], both["prompt_embeds"].shape[1]]


def test_padding_stays_if_the_denoiser_takes_no_mask() -> None:
    pipeline = build("pixart")
    forward = pipeline.transformer.forward
    pipeline.transformer.forward = lambda hidden_states, encoder_hidden_states: forward(hidden_states, encoder_hidden_states)
    assert first(pipeline).encode(["dog"])["prompt_embeds"].shape[1] == 120


@pytest.mark.parametrize("name", ["pixart", "z_image", "qwen_image"])
def test_more_texts_than_a_batch_are_encoded_as_one_by_one(name: str) -> None:
    conditioning = first(build(name))
    texts = ["dog"] * BATCH_SIZE + [CAPTIONS[1]]
    tensors = conditioning.encode(texts)
    assert {len(tensor) for tensor in tensors.values()} == {BATCH_SIZE + 1}
    [mask] = [name for name in tensors if "mask" in name]
    for row, text in ((0, "dog"), (BATCH_SIZE, CAPTIONS[1])):
        alone = conditioning.encode([text])
        assert tensors[mask][row].sum() == alone[mask].sum()
        torch.testing.assert_close(tensors["prompt_embeds"][row][tensors[mask][row]], alone["prompt_embeds"][0], **CLOSE)


def test_a_mask_is_there_even_if_it_leaves_nothing_out() -> None:
    tensors = first(build("qwen_image")).encode(["dog", "cat"])
    assert tensors["prompt_embeds_mask"].all()


def test_a_list_of_sequences_is_handed_back_with_each_ones_length() -> None:
    conditioning = first(build("z_image"))
    tensors = conditioning.encode(CAPTIONS)
    arguments = conditioning.arguments(tensors, guided=True)
    assert set(arguments) == {"prompt_embeds", "negative_prompt_embeds", "negative_prompt"}
    lengths = [len(sequence) for sequence in arguments["prompt_embeds"]]
    assert lengths == tensors["prompt_embeds_mask"].sum(1).tolist()
    assert len(set(lengths)) == 3


def test_a_learned_mask_that_leaves_out_everything_still_gives_a_picture() -> None:
    pipeline = build("z_image")
    conditioning = first(pipeline)
    tensors = conditioning.encode(["dog"])
    tensors["prompt_embeds_mask"] = torch.zeros_like(tensors["prompt_embeds_mask"])
    assert draw(pipeline, conditioning.arguments(tensors, guided=False), guided=False).shape[0] == 1


def test_xl_is_guided_against_zeros_as_it_is_by_itself() -> None:
    conditioning = first(build("sdxl"))
    arguments = conditioning.arguments(conditioning.encode(CAPTIONS), guided=True)
    assert arguments["negative_prompt_embeds"].shape == (3, 77, 64)
    assert not arguments["negative_prompt_embeds"].any()
    assert not arguments["negative_pooled_prompt_embeds"].any()


def test_the_callers_own_negatives_are_used() -> None:
    conditioning = first(build("stable_diffusion"))
    tensors = conditioning.encode(["dog", "cat"])
    against = conditioning.encode(["ugly"])["prompt_embeds"]
    arguments = conditioning.arguments({**tensors, "negative_prompt_embeds": against}, guided=True)
    torch.testing.assert_close(arguments["negative_prompt_embeds"], against.expand(2, -1, -1))
    assert "negative_prompt_embeds" not in conditioning.arguments(tensors, guided=False)


def test_a_negative_longer_than_the_text_is_not_cut() -> None:
    pipeline = build("pixart")
    conditioning = first(pipeline)
    negative = {f"negative_{name}": tensor for name, tensor in conditioning.encode([CAPTIONS[1]]).items()}
    positive = conditioning.encode(["dog"])
    arguments = conditioning.arguments({**positive, **negative}, guided=True)
    torch.testing.assert_close(arguments["negative_prompt_embeds"], negative["negative_prompt_embeds"])
    assert arguments["prompt_embeds"].shape == arguments["negative_prompt_embeds"].shape
    assert arguments["prompt_attention_mask"].sum() == positive["prompt_attention_mask"].sum()
    assert draw(pipeline, arguments, guided=True).shape[0] == 1


def test_the_argument_that_scales_guidance_is_the_one_that_weighs_negatives() -> None:
    named = {name: guidance_argument(build(name)) for name in (*PROMPTED, "unconditional")}
    true = {"flux": "true_cfg_scale", "qwen_image": "true_cfg_scale", "unconditional": None}
    assert named == {name: true.get(name, "guidance_scale") for name in named}


def test_a_pipeline_without_its_text_encoder_says_so_and_can_still_be_driven() -> None:
    pipeline = build("pixart")
    tensors = first(pipeline).encode(["dog"])
    pipeline.text_encoder = None
    conditioning = first(pipeline)
    with pytest.raises(BridgekitError, match="no text encoder"):
        conditioning.encode(["dog"])
    with pytest.raises(BridgekitError, match="no text encoder"):
        conditioning.arguments(tensors, guided=True)
    assert draw(pipeline, conditioning.arguments(tensors, guided=False), guided=False).shape[0] == 1
    negatives = {f"negative_{name}": torch.zeros_like(tensor) for name, tensor in tensors.items()}
    negatives["negative_prompt_attention_mask"][:, 0] = True
    assert draw(pipeline, conditioning.arguments({**tensors, **negatives}, guided=True), guided=True).shape[0] == 1


def test_one_text_encoder_of_three_may_be_missing() -> None:
    pipeline = build("sd3")
    pipeline.text_encoder_3 = None
    assert first(pipeline).encode(["dog"])["prompt_embeds"].shape == (1, 77 + 256, 64)


def test_an_unusable_text_fails_only_its_item() -> None:
    conditioning = first(build("stable_diffusion"))
    with pytest.raises(ItemError, match="empty"):
        conditioning.encode(["dog", "  "])
    with pytest.raises(BridgekitError, match="made of texts"):
        conditioning.encode(pictures(1))


def test_prompt_embeddings_take_no_prompt_beside_them() -> None:
    conditioning = first(build("stable_diffusion"))
    with pytest.raises(BridgekitError, match="in place of a prompt"):
        conditioning.arguments(conditioning.encode(["dog"]), guided=True, prompt="in oil")


def test_prompt_embeddings_are_not_an_encoders_latents() -> None:
    pipeline = build("sd_ip_adapter")
    pipeline.unload_ip_adapter()
    pipeline.register_modules(image_encoder=None)
    assert not first(pipeline).takes_latents_of(Clip(pipelines.clip_vision()))


def test_lora_weights_of_the_text_encoder_take_part() -> None:
    peft = pytest.importorskip("peft")
    pipeline = build("stable_diffusion")
    before = first(pipeline).encode(["dog"])["prompt_embeds"]
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "to_q", "to_v"], init_lora_weights=False)
    peft.inject_adapter_in_model(lora, pipeline.text_encoder)
    pipeline.unet.add_adapter(lora)
    conditioning = first(pipeline)
    tensors = conditioning.encode(["dog"])
    assert not torch.allclose(tensors["prompt_embeds"], before)
    drawn = draw(pipeline, conditioning.arguments(tensors, guided=True), guided=True)
    np.testing.assert_allclose(drawn, own_latents(pipeline, ["dog"], guided=True), **CLOSE)


@pytest.mark.parametrize("name", ["sdxl", "pixart"])
def test_offloaded_pipelines_work_and_give_their_memory_back(name: str) -> None:
    pytest.importorskip("accelerate")
    pipeline, plain = build(name), build(name)
    pipeline.enable_model_cpu_offload(device="cpu")  # no accelerator here, but the hooks are those of one
    freed = []
    free = pipeline.maybe_free_model_hooks
    pipeline.maybe_free_model_hooks = lambda: (freed.append(1), free())
    conditioning = first(pipeline)
    tensors = conditioning.encode(["dog"])
    assert freed
    drawn = draw(pipeline, conditioning.arguments(tensors, guided=True), guided=True)
    np.testing.assert_allclose(drawn, own_latents(plain, ["dog"], guided=True), **CLOSE)


# ---- pictures


def test_a_pipeline_of_pictures_takes_embeddings_of_pictures(pictured: Any) -> None:
    conditioning = first(pictured)
    adapter = "ip_adapter" in pictured.bridgekit_name
    assert conditioning.kind == ("ip_adapter_image_embeds" if adapter else "image_embeds")
    assert conditioning.made_of == "image"
    if pictured.bridgekit_name == "kandinsky22":
        with pytest.raises(BridgekitError, match="cannot encode images itself"):
            conditioning.encode(pictures(1))
        return
    tensors = conditioning.encode(pictures(3))
    plus = pictured.bridgekit_name == "sd_ip_adapter_plus"
    shape = (3, 17, pipelines.WIDTH) if plus else (3, pipelines.IMAGE_WIDTH)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {conditioning.kind: shape}
    assert tensors[conditioning.kind].dtype == torch.float32
    assert not tensors[conditioning.kind].is_inference()


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("name", ["stable_unclip_img2img", "sd_ip_adapter", "sd_ip_adapter_plus", "flux_ip_adapter"])
def test_its_own_image_embedding_handed_back_gives_the_picture_of_the_picture(name: str, guided: bool) -> None:
    pipeline = build(name)
    conditioning = first(pipeline)
    [picture] = pictures(1)
    arguments = conditioning.arguments(conditioning.encode([picture]), guided=guided, prompt="in oil")
    asked = {"ip_adapter_image" if "adapter" in name else "image": picture, "prompt": ["in oil"]}
    own = draw(pipeline, asked, guided=guided)
    np.testing.assert_allclose(draw(pipeline, arguments, guided=guided), own, **CLOSE)


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("n", [1, 3])
def test_image_embeddings_become_pictures(pictured: Any, n: int, guided: bool) -> None:
    arguments = first(pictured).arguments(embeddings(pictured, n), guided=guided)
    drawn = draw(pictured, arguments, guided=guided, seeds=range(n), output="np")
    assert drawn.shape == (n, 64, 64, 3)
    assert 0 <= drawn.min() < drawn.max() <= 1


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
def test_a_batch_of_embeddings_gives_the_pictures_of_each_alone(pictured: Any, guided: bool) -> None:
    conditioning = first(pictured)
    tensors = embeddings(pictured, 3)
    together = draw(pictured, conditioning.arguments(tensors, guided=guided), guided=guided, seeds=(5, 6, 7))
    for row in range(3):
        alone = conditioning.arguments({name: tensor[row : row + 1] for name, tensor in tensors.items()}, guided=guided)
        np.testing.assert_allclose(draw(pictured, alone, guided=guided, seeds=(5 + row,))[0], together[row], **CLOSE)
    assert not np.allclose(together[0], together[1], **CLOSE)


def test_pipelines_of_pictures_work_in_half_precision(pictured: Any) -> None:
    pictured.to(torch.bfloat16)
    conditioning = first(pictured)
    drawn = draw(pictured, conditioning.arguments(embeddings(pictured, 2), guided=True), guided=True, seeds=(0, 1))
    assert np.isfinite(drawn).all()


def test_paths_and_pictures_are_encoded_alike(tmp_path: Path) -> None:
    conditioning = first(build("stable_unclip_img2img"))
    [picture] = pictures(1)
    picture.save(tmp_path / "one.png")
    from_path, from_text, from_memory = conditioning.encode([tmp_path / "one.png", str(tmp_path / "one.png"), picture])[
        "image_embeds"
    ]
    torch.testing.assert_close(from_path, from_memory)
    torch.testing.assert_close(from_text, from_memory)


@pytest.mark.parametrize("name", ["stable_unclip_img2img", "sd_ip_adapter"])
def test_a_prompt_steers_beside_an_image_embedding(name: str) -> None:
    pipeline = build(name)
    conditioning = first(pipeline)
    tensors = conditioning.encode(pictures(1))
    plain, steered = (
        draw(pipeline, conditioning.arguments(tensors, guided=True, prompt=prompt), guided=True) for prompt in (None, "in oil")
    )
    assert not np.allclose(plain, steered, **CLOSE)


def test_a_decoder_without_prompts_refuses_one() -> None:
    pipeline = build("kandinsky22")
    with pytest.raises(BridgekitError, match="takes no prompt"):
        first(pipeline).arguments(embeddings(pipeline, 1), guided=True, prompt="in oil")


def test_a_decoder_is_guided_against_zeros_or_against_what_it_is_given() -> None:
    pipeline = build("kandinsky22")
    tensors = embeddings(pipeline, 2)
    assert not first(pipeline).arguments(tensors, guided=True)["negative_image_embeds"].any()
    against = torch.ones(1, pipelines.IMAGE_WIDTH)
    arguments = first(pipeline).arguments({**tensors, "negative_image_embeds": against}, guided=True)
    torch.testing.assert_close(arguments["negative_image_embeds"], against.expand(2, -1))


@dataclass
class Clip:
    """A frozen encoder over a CLIP image tower, as a bridge would have it."""

    tower: Any
    unit_length: bool = False
    modality: str = "image"
    revision: str = "toy:clip@1"

    @property
    def dim(self) -> int:
        return int(self.tower.config.projection_dim)

    def prepare(self, item: Item) -> Tensor:
        pixels: Tensor = pipelines.picture_processor()(images=read_image(Path(item)), return_tensors="pt").pixel_values
        return pixels

    @torch.inference_mode()
    def encode(self, batch: Sequence[Tensor]) -> Tensor:
        rows: Tensor = self.tower(torch.cat(list(batch))).image_embeds
        return normalize(rows, dim=-1) if self.unit_length else rows


@pytest.mark.parametrize("unit_length", [False, True])
@pytest.mark.parametrize("name", ["stable_unclip_img2img", "sd_ip_adapter"])
def test_the_pipelines_own_clip_is_recognised_in_a_bridge(name: str, unit_length: bool) -> None:
    pipeline = build(name)
    assert first(pipeline).takes_latents_of(Clip(pipeline.image_encoder, unit_length))


@pytest.mark.parametrize("name", ["stable_unclip_img2img", "sd_ip_adapter"])
def test_another_encoder_of_the_same_width_is_not_taken_for_it(name: str) -> None:
    pipeline = build(name)
    torch.manual_seed(99)
    assert not first(pipeline).takes_latents_of(Clip(pipelines.clip_vision()))
    assert not first(pipeline).takes_latents_of(Clip(pipeline.image_encoder, modality="text"))


def test_hidden_states_are_not_an_encoders_latents() -> None:
    pipeline = build("sd_ip_adapter_plus")
    assert not first(pipeline).takes_latents_of(Clip(pipeline.image_encoder))


@pytest.mark.parametrize("name", ["kandinsky22", "sd_ip_adapter"])
def test_a_pipeline_that_cannot_encode_pictures_goes_by_the_width(name: str) -> None:
    pipeline = build(name)
    if name == "sd_ip_adapter":
        pipeline.register_modules(image_encoder=None)
    conditioning = first(pipeline)
    tower = pipelines.clip_vision()
    assert conditioning.takes_latents_of(Clip(tower))
    assert not conditioning.takes_latents_of(Clip(tower, modality="audio"))
    tower.config.projection_dim = 77
    assert not conditioning.takes_latents_of(Clip(tower))


def test_an_adapter_without_its_image_encoder_can_still_be_driven() -> None:
    pipeline = build("sd_ip_adapter")
    tensors = first(pipeline).encode(pictures(2))
    whole = draw(pipeline, first(pipeline).arguments(tensors, guided=True), guided=True, seeds=(0, 1))
    pipeline.register_modules(image_encoder=None)
    with pytest.raises(BridgekitError, match="no image encoder"):
        first(pipeline).encode(pictures(1))
    np.testing.assert_allclose(
        draw(pipeline, first(pipeline).arguments(tensors, guided=True), guided=True, seeds=(0, 1)), whole
    )


def test_an_adapter_driven_in_batches_is_otherwise_as_diffusers_made_it() -> None:
    used, untouched = build("sd_ip_adapter"), build("sd_ip_adapter")
    conditioning = first(used)
    for _ in range(2):
        draw(used, conditioning.arguments(conditioning.encode(pictures(3)), guided=True), guided=True, seeds=(0, 1, 2))
    one_for_all = torch.randn(2, 1, pipelines.IMAGE_WIDTH)
    for guided in (True, False):
        asked = {"ip_adapter_image_embeds": [one_for_all[: 1 + guided]], "prompt": CAPTIONS}
        one, other = (draw(pipeline, asked, guided=guided, seeds=(0, 1, 2)) for pipeline in (used, untouched))
        np.testing.assert_array_equal(one, other)


# ---- which conditioning a pipeline offers


@pytest.mark.parametrize("name", ["sd_ip_adapter", "flux_ip_adapter"])
def test_an_adapter_is_offered_alone_while_it_is_loaded(name: str) -> None:
    pipeline = build(name)
    assert [found.kind for found in find_conditionings(pipeline)] == ["ip_adapter_image_embeds"]
    pipeline.unload_ip_adapter()
    assert [found.kind for found in find_conditionings(pipeline)] == ["prompt_embeds"]


def test_two_adapters_at_once_are_too_many() -> None:
    pipeline = build("sd_ip_adapter")
    weights = pipelines.ip_adapter_weights(pipeline.unet, plus=False)
    pipeline.load_ip_adapter([weights, weights], subfolder=["", ""], weight_name=["", ""])
    with pytest.raises(BridgekitError, match="several IP-Adapters"):
        find_conditionings(pipeline)


def test_a_pipeline_without_usable_conditioning_is_refused_with_what_was_looked_for() -> None:
    with pytest.raises(BridgekitError) as caught:
        find_conditionings(build("unconditional"))
    for part in ("DDPMPipeline", "ip_adapter_image_embeds", "image_embeds", "prompt_embeds"):
        assert part in str(caught.value)


def test_a_pipeline_that_also_needs_the_prompt_itself_is_refused_with_the_reason() -> None:
    with pytest.raises(BridgekitError, match=r"StableUnCLIPPipeline.*requires the prompt itself.*_encode_prior_prompt"):
        find_conditionings(build("stable_unclip"))


def test_no_class_is_known_by_its_name() -> None:
    """A custom pipeline, with wrapped methods and unusual names, is inspected like any other."""
    from diffusers import StableDiffusionPipeline

    class Mine(StableDiffusionPipeline):  # type: ignore[misc]
        @wrapped
        def encode_prompt(self, prompt: list[str], device: Any, do_classifier_free_guidance: bool = True) -> tuple[Any, ...]:
            negative_prompt_embeds, prompt_embeds = torch.zeros(1, 5, 32), torch.ones(len(prompt), 5, 32)
            return negative_prompt_embeds if do_classifier_free_guidance else None, "a note", prompt_embeds.to(device)

    pipeline = Mine(**build("stable_diffusion").components, requires_safety_checker=False)
    conditioning = first(pipeline)
    tensors = conditioning.encode(["dog", "cat"])
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {"prompt_embeds": (2, 5, 32)}
    assert tensors["prompt_embeds"].all()
    assert conditioning.arguments(tensors, guided=True)["negative_prompt_embeds"].shape == (2, 5, 32)


def wrapped(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapper(*args: Any, **named: Any) -> Any:
        return method(*args, **named)

    return wrapper
