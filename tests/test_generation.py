"""From a sound to a picture, through tiny pipelines of the stock diffusers classes with random weights (see `pipelines.py`)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")

from bridgekit import Bridge, BridgekitError, Input
from bridgekit.diffusion import conditioner, painter
from bridgekit.diffusion.conditioner import Fit
from bridgekit.diffusion.models import DrawOptions, find_conditionings, open_model
from bridgekit.diffusion.painter import blend, mix, open_painter, paint
from bridgekit.image_models import ImageModel
from bridgekit.recipes.generate import Generation, generate
from tests import pipelines
from tests.conftest import tone
from tests.painting import Workshop
from tests.toys import NAMES

#: Each family: what its bridge joins audio with, whether that side is frozen, and the argument that is filled.
FAMILIES = {
    "stable_diffusion": ("text", "", "prompt_embeds"),
    "sdxl": ("text", "", "prompt_embeds"),
    "sd3": ("text", "", "prompt_embeds"),
    "flux": ("text", "", "prompt_embeds"),
    "pixart": ("text", "", "prompt_embeds"),
    "kandinsky22": ("image", "image", "image_embeds"),
    "stable_unclip_img2img": ("image", "", "image_embeds"),
}
#: Batching changes sums by a rounding error, which may change a pixel by one.
ABOUT = {"rtol": 0.0, "atol": 2.0}


@pytest.fixture(autouse=True)
def quick(picture_toys: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The plugin with pictures, an empty working directory, and conditioners fitted with few steps."""
    monkeypatch.setattr(painter, "fit_conditioner", partial(conditioner.fit_conditioner, fit=Fit(steps=3, batch_size=4)))
    monkeypatch.setattr(conditioner, "WIDTH", 32)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder for each pipeline, as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("models")

    def saved(name: str) -> Path:
        if not (folder / name).exists():
            getattr(pipelines, name)().save_pretrained(folder / name)
        return folder / name

    return saved


@pytest.fixture
def bridge(workshop: Workshop, tmp_path: Path) -> Path:
    """A bridge of sounds and names."""
    return workshop.bridge(tmp_path / "bridge")


@pytest.fixture
def sd(models: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny Stable Diffusion that a test may modify."""
    return Path(shutil.copytree(models("stable_diffusion"), tmp_path / "sd"))


@pytest.fixture
def draw(bridge: Path, sd: Path) -> Callable[..., Generation]:
    """`generate` on the bridge and Stable Diffusion, small and quick."""
    return partial(generate, bridge, model=str(sd), steps=2, size=32, progress=False)


def pixels(file: Path | Image.Image) -> npt.NDArray[np.float32]:
    return np.asarray(Image.open(file) if isinstance(file, Path) else file, np.float32)


def story(file: Path) -> dict[str, Any]:
    told = json.loads(Image.open(file).info["bridgekit"])
    assert isinstance(told, dict)
    return told


# ---- every family, end to end


@pytest.mark.parametrize("family", FAMILIES)
def test_sounds_become_pictures_through_every_family(
    workshop: Workshop, models: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    other, frozen, kind = FAMILIES[family]
    folder = workshop.bridge(tmp_path / "bridge", "audio", other, frozen)
    run = partial(generate, folder, model=str(models(family)), steps=2, size=32, progress=False)
    clips = [str(workshop.clip(name)) for name in ("ant", "owl", "seal")]
    # Neighbouring seeds: each clip with two of them, and one clip alone with the later one.
    three = run([Input("audio", clips)], n=2, seed=7, out="three")
    assert len(three.pictures) == 6
    assert (three.conditioner.kind, three.conditioner.made_of) == (kind, other)
    assert (three.conditioner.net is None) == bool(frozen)
    assert three.fitted
    drawn = [pixels(made.file) for made in three.pictures]
    assert {picture.shape for picture in drawn} == {(32, 32, 3)}
    assert not np.allclose(drawn[0], drawn[1], **ABOUT)
    alone = run([Input("audio", clips[1])], seed=8, out="alone.png")
    assert not alone.fitted
    np.testing.assert_allclose(pixels(alone.pictures[0].file), drawn[3], **ABOUT)
    # With guidance and without it, it is drawn; with it, it is another picture.
    scale = {"flux": 3.5}.get(family, 6.0)
    guided, free = (
        pixels(run([Input("audio", clips)], guidance=guidance, out=f"at-{guidance}").pictures[2].file)
        for guidance in (scale, 1.0)
    )
    assert guided.shape == free.shape == (32, 32, 3)
    assert not np.allclose(guided, free, atol=0.5)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_sounds_become_pictures_through_an_ip_adapter(workshop: Workshop, tmp_path: Path, guidance: float) -> None:
    """diffusers does not save a loaded IP-Adapter, so the model is made here rather than opened by its folder."""
    folder = workshop.bridge(tmp_path / "bridge", "audio", "image")
    pipeline = pipelines.sd_ip_adapter()
    painter = open_painter(Bridge.load(folder), ImageModel("adapter", pipeline, find_conditionings(pipeline), steps=2), folder)
    assert painter.conditioning.kind == "ip_adapter_image_embeds"
    embeddings = painter.bridge.embed("audio", [workshop.clip(name) for name in ("ant", "owl", "seal")])
    options = DrawOptions(guidance=guidance, size=32)
    three = paint(painter, embeddings, options, seeds=[0, 1, 2])
    [alone] = paint(painter, embeddings[1:2], options, seeds=1)
    np.testing.assert_allclose(pixels(alone), pixels(three[1]), **ABOUT)
    [steered] = paint(painter, embeddings[1:2], replace(options, prompt="in oil"), seeds=1)
    assert not np.allclose(pixels(alone), pixels(steered), **ABOUT)
    assert open_painter(painter.bridge, painter.model, folder).fitted is False


# ---- inputs


def test_the_same_seed_gives_the_same_picture_and_another_seed_another_one(
    workshop: Workshop, draw: Callable[..., Generation]
) -> None:
    inputs = [Input("audio", workshop.clip("owl"))]
    one, two, other = (
        pixels(draw(inputs, seed=seed, out=f"{name}.png").pictures[0].file) for name, seed in {"a": 0, "b": 0, "c": 1}.items()
    )
    # The first is drawn with the conditioner as fitted, the second with the saved one: equal up to rounding.
    np.testing.assert_allclose(one, two, atol=1)
    assert not np.allclose(one, other, **ABOUT)


def test_more_pictures_than_fit_in_a_batch_are_drawn_in_several(
    workshop: Workshop, draw: Callable[..., Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [Input("audio", [workshop.clip(name) for name in ("ant", "owl", "seal")])]
    whole = draw(inputs, n=2, out="whole")
    monkeypatch.setattr("bridgekit.diffusion.models.BATCH_SIZE", 4)
    parts = draw(inputs, n=2, out="parts")
    for one, other in zip(whole.pictures, parts.pictures, strict=True):
        np.testing.assert_allclose(pixels(one.file), pixels(other.file), **ABOUT)


def test_weights_lean_a_mixture_to_one_side(workshop: Workshop, draw: Callable[..., Generation]) -> None:
    owl, words = workshop.clip("owl"), "seal"
    heard = [
        draw([Input("audio", owl, weight), Input("text", words, 1.0)], gap="none").pictures[0].nearest[0].item
        for weight in (20.0, 0.05)
    ]
    assert heard == ["owl", "seal"]


def test_a_mixture_is_a_weighted_sum_at_unit_length() -> None:
    one, two = torch.eye(3)[:1], torch.eye(3)[1:]
    mixed = mix([one, two], [1.0, 2.0])
    torch.testing.assert_close(mixed, torch.tensor([[1.0, 2, 0], [1, 0, 2]]) / 5**0.5)


def test_a_folder_mixed_with_one_text_gives_a_picture_for_each_clip(
    workshop: Workshop, draw: Callable[..., Generation], tmp_path: Path
) -> None:
    for name in ("ant", "owl"):
        shutil.copy(workshop.clip(name), tmp_path / f"{name}.wav")
    (tmp_path / "clips").mkdir()
    for name in ("ant", "owl"):
        (tmp_path / f"{name}.wav").rename(tmp_path / "clips" / f"{name}.wav")
    done = draw([Input("audio", "clips"), Input("text", "seal", 0.5)])
    assert [made.inputs[1] for made in done.pictures] == ["seal", "seal"]
    assert [made.file.as_posix() for made in done.pictures] == ["pictures/ant + seal.png", "pictures/owl + seal.png"]
    with pytest.raises(BridgekitError, match="only one input"):
        draw([Input("audio", "clips"), Input("text", ["seal", "fox"])])


def test_a_prompt_steers_the_picture_by_its_weight(workshop: Workshop, draw: Callable[..., Generation]) -> None:
    inputs = [Input("audio", workshop.clip("owl"))]
    plain = pixels(draw(inputs, out="a.png").pictures[0].file)
    steered = pixels(draw(inputs, out="b.png", prompt="in oil, at night").pictures[0].file)
    not_at_all = pixels(draw(inputs, out="c.png", prompt="in oil, at night", prompt_weight=0).pictures[0].file)
    assert not np.allclose(plain, steered, **ABOUT)
    np.testing.assert_allclose(plain, not_at_all, **ABOUT)


def test_how_the_gap_is_closed_shows_in_the_picture(workshop: Workshop, draw: Callable[..., Generation]) -> None:
    inputs = [Input("audio", workshop.clip("owl"))]
    drawn = [pixels(draw(inputs, gap=gap, out=f"{gap}.png").pictures[0].file) for gap in ("captions", "mean", "none")]
    assert not np.allclose(drawn[0], drawn[1], atol=0.5)
    assert not np.allclose(drawn[1], drawn[2], atol=0.5)


def test_a_blend_of_two_conditionings_keeps_what_only_one_of_them_has() -> None:
    short = {"prompt_embeds": torch.ones(2, 2, 3), "prompt_attention_mask": torch.tensor([[True, False], [True, True]])}
    long = {"prompt_embeds": torch.full((1, 3, 3), 5.0), "prompt_attention_mask": torch.ones(1, 3, dtype=torch.bool)}
    blended = blend(short, long, 0.25)
    assert blended["prompt_attention_mask"].all()
    # Where the first has nothing (behind its mask or its end), what stands there is of no worth and takes no part.
    assert blended["prompt_embeds"][..., 0].tolist() == [[2, 5, 5], [2, 2, 5]]


# ---- outputs


def test_a_folder_of_clips_gives_one_picture_each_and_a_contact_sheet(
    workshop: Workshop, draw: Callable[..., Generation], tmp_path: Path
) -> None:
    (tmp_path / "clips").mkdir()
    for name in ("ant", "owl", "seal"):
        shutil.copy(workshop.clip(name), tmp_path / "clips" / f"{name}.wav")
    done = draw([Input("audio", "clips")])
    assert [made.file.as_posix() for made in done.pictures] == [f"pictures/{name}.png" for name in ("ant", "owl", "seal")]
    assert done.sheet == Path("pictures/sheet.png")
    assert pixels(done.sheet).ndim == 3
    assert [made.nearest[0].item for made in done.pictures] == ["ant", "owl", "seal"]


def test_a_broken_clip_is_set_aside_and_the_others_are_drawn(
    workshop: Workshop, draw: Callable[..., Generation], tmp_path: Path
) -> None:
    (tmp_path / "clips").mkdir()
    shutil.copy(workshop.clip("owl"), tmp_path / "clips" / "owl.wav")
    (tmp_path / "clips" / "note.wav").write_text("not audio")
    done = draw([Input("audio", "clips")])
    assert [made.file.name for made in done.pictures] == ["owl.png"]
    assert [Path(item).name for item in done.set_aside] == ["note.wav"]
    (tmp_path / "clips" / "owl.wav").unlink()
    with pytest.raises(BridgekitError, match="no input is usable") as caught:
        draw([Input("audio", "clips")])
    assert "note.wav" in str(caught.value)


def test_a_picture_says_how_it_was_made(workshop: Workshop, draw: Callable[..., Generation], bridge: Path, sd: Path) -> None:
    clip = str(workshop.clip("owl"))
    done = draw([Input("audio", clip)], n=2, seed=3, prompt="in oil")
    told = story(done.pictures[1].file)
    assert told["bridge"] == str(bridge)
    assert told["model"] == str(sd)
    assert (told["seed"], told["inputs"], told["prompt"], told["gap"]) == (4, [clip], "in oil", "captions")
    assert told["nearest"][0][0] == "owl"
    assert "command" in told
    assert story(done.sheet or Path())["model"] == str(sd)


def test_one_picture_is_written_here_and_named_after_its_input(workshop: Workshop, draw: Callable[..., Generation]) -> None:
    done = draw([Input("audio", workshop.clip("owl"))])
    assert [made.file for made in done.pictures] == [Path("owl 0.png")]
    assert done.sheet is None
    two = draw([Input("audio", workshop.clip("owl"))], n=2, out="deep/er")
    assert [made.file for made in two.pictures] == [Path("deep/er/owl 0-0.png"), Path("deep/er/owl 0-1.png")]
    assert draw([Input("text", "a/b: owl?")], out="x").pictures[0].file == Path("x/a_b_ owl_.png")


def test_inputs_with_the_same_name_give_pictures_with_different_names(
    workshop: Workshop, draw: Callable[..., Generation], tmp_path: Path
) -> None:
    for folder in ("a", "b"):
        (tmp_path / "clips" / folder).mkdir(parents=True)
        shutil.copy(workshop.clip("owl"), tmp_path / "clips" / folder / "sheet.wav")
    done = draw([Input("audio", "clips")])
    assert len({made.file for made in done.pictures} | {done.sheet}) == 3


def test_one_output_file_for_several_pictures_is_refused_before_drawing(
    workshop: Workshop, draw: Callable[..., Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridgekit.recipes.generate.paint", None)
    with pytest.raises(BridgekitError, match="cannot write 2 images to one file"):
        draw([Input("audio", workshop.clip("owl"))], n=2, out="owl.png")


@pytest.mark.parametrize("out", ["/proc/nothing/owl.png", "taken/owl.png", "owl.jpg"])
def test_an_output_folder_that_cannot_be_written_is_reported_before_drawing(
    workshop: Workshop, draw: Callable[..., Generation], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, out: str
) -> None:
    monkeypatch.setattr("bridgekit.recipes.generate.paint", None)
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(BridgekitError) as caught:
        draw([Input("audio", workshop.clip("owl"))], out=out)
    assert Path(caught.value.where or "") in (Path(out), *Path(out).parents)
    assert caught.value.remedy


def test_the_users_own_files_are_not_overwritten(workshop: Workshop, draw: Callable[..., Generation], tmp_path: Path) -> None:
    """A photo may well lie beside the clip that was taken with it."""
    shutil.copy(workshop.clip("owl"), "owl.wav")
    Image.new("RGB", (9, 9), "red").save("owl.png")
    mine = Path("owl.png").read_bytes()
    done = draw([Input("audio", "owl.wav")])
    assert Path("owl.png").read_bytes() == mine
    assert done.pictures[0].file == Path("owl-2.png")
    # One of ours is replaced by the next run, as any output is.
    assert draw([Input("audio", "owl.wav")], seed=1).pictures[0].file == Path("owl-2.png")
    assert story(Path("owl-2.png"))["seed"] == 1


def test_long_and_odd_names_work(workshop: Workshop, draw: Callable[..., Generation], tmp_path: Path) -> None:
    sentence = "an owl " * 60
    assert draw([Input("text", sentence)]).pictures[0].file.is_file()
    clip = tmp_path / f"{'鳥' * 80}.wav"
    shutil.copy(workshop.clip("owl"), clip)
    assert draw([Input("audio", clip), Input("text", "ふくろう" * 20)]).pictures[0].file.is_file()
    with pytest.raises(BridgekitError, match="no such file"):
        draw([Input("audio", "x" * 400)])


# ---- the conditioner is kept


def test_a_conditioner_is_fitted_once_and_kept_in_the_bridges_folder(
    workshop: Workshop, draw: Callable[..., Generation], bridge: Path
) -> None:
    inputs = [Input("audio", workshop.clip("owl"))]
    first, second, again = draw(inputs), draw(inputs), draw(inputs, refit=True)
    assert (first.fitted, second.fitted, again.fitted) == (True, False, True)
    assert len(list((bridge / "conditioners").iterdir())) == 1
    assert sorted(first.conditioner.items) == NAMES
    assert torch.equal(first.conditioner.embeddings, second.conditioner.embeddings)


def test_it_is_fitted_again_when_the_models_text_encoder_changes_and_not_when_only_its_unet_does(
    workshop: Workshop, draw: Callable[..., Generation], sd: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    inputs = [Input("audio", workshop.clip("owl"))]
    draw(inputs)
    pipeline = pipelines.stable_diffusion()
    torch.manual_seed(5)
    pipeline.unet = pipelines.unet()
    pipeline.save_pretrained(sd)
    assert not draw(inputs).fitted
    pipeline.text_encoder = pipelines.clip_text(pipelines.clip_tokenizer())
    pipeline.save_pretrained(sd)
    assert isinstance(pipeline, StableDiffusionPipeline)
    assert draw(inputs).fitted
    assert not draw(inputs).fitted


def test_it_is_fitted_again_for_another_model_and_both_are_kept(
    workshop: Workshop, draw: Callable[..., Generation], models: Callable[[str], Path]
) -> None:
    inputs = [Input("audio", workshop.clip("owl"))]
    draw(inputs)
    assert draw(inputs, model=str(models("sdxl"))).fitted
    assert not draw(inputs).fitted
    assert not draw(inputs, model=str(models("sdxl"))).fitted


def test_a_damaged_conditioner_is_fitted_again(workshop: Workshop, draw: Callable[..., Generation], bridge: Path) -> None:
    inputs = [Input("audio", workshop.clip("owl"))]
    draw(inputs)
    [file] = (bridge / "conditioners").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert draw(inputs).fitted
    assert not draw(inputs).fitted


def test_a_bridge_that_cannot_be_written_to_still_draws(
    workshop: Workshop, draw: Callable[..., Generation], bridge: Path
) -> None:
    (bridge / "conditioners").write_text("in the way")
    assert draw([Input("audio", workshop.clip("owl"))]).fitted


def test_the_conditioner_is_fitted_on_the_users_own_captions_if_given(
    workshop: Workshop, draw: Callable[..., Generation], tmp_path: Path
) -> None:
    inputs = [Input("audio", workshop.clip("owl"))]
    (tmp_path / "words.txt").write_text("heron\nowl\nrobin\n")
    draw(inputs)
    done = draw(inputs, captions="words.txt")
    assert done.fitted
    assert list(done.conditioner.items) == ["heron", "owl", "robin"]
    assert not draw(inputs, captions="words.txt").fitted
    assert not draw(inputs).fitted


def test_without_the_bridges_table_a_saved_conditioner_is_used_or_captions_are_required(
    workshop: Workshop, draw: Callable[..., Generation], bridge: Path, tmp_path: Path
) -> None:
    inputs = [Input("audio", workshop.clip("owl"))]
    told = json.loads((bridge / "bridge.json").read_text())
    told["provenance"]["pairs"] = "moved.csv"
    (bridge / "bridge.json").write_text(json.dumps(told))
    with pytest.raises(BridgekitError, match="is not here") as caught:
        draw(inputs)
    assert "--captions" in str(caught.value)
    (tmp_path / "words.txt").write_text("\n".join(NAMES))
    assert draw(inputs, captions="words.txt").fitted
    assert not draw(inputs).fitted


def test_a_bridge_without_provenance_requires_captions(
    workshop: Workshop, draw: Callable[..., Generation], bridge: Path, tmp_path: Path
) -> None:
    told = json.loads((bridge / "bridge.json").read_text())
    del told["provenance"]["pairs"]
    (bridge / "bridge.json").write_text(json.dumps(told))
    (tmp_path / "not a caption").mkdir()
    with pytest.raises(BridgekitError, match="--captions"):
        draw([Input("audio", workshop.clip("owl"))])


# ---- mistakes


def without(part: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def garbled(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")


SPOILED: dict[str, Callable[[Path], None]] = {
    "without its unet": without("unet"),
    "without its text encoder": without("text_encoder"),
    "without its tokenizer": without("tokenizer"),
    "without its scheduler": without("scheduler"),
    "without the weights of its vae": without("vae/diffusion_pytorch_model.safetensors"),
    "without the config of its vae": without("vae/config.json"),
    "with weights of its vae that are none": garbled,
    "without model_index.json": without("model_index.json"),
    "with a model_index.json that is none": lambda folder: (folder / "model_index.json").write_text("{"),
}


def clear(error: BridgekitError) -> None:
    """One message of one to three lines that says how to fix it."""
    assert error.remedy
    assert 2 <= len(str(error).splitlines()) <= 3


@pytest.mark.parametrize("spoil", SPOILED)
def test_a_model_folder_that_is_not_whole_is_one_clear_message(
    workshop: Workshop, draw: Callable[..., Generation], sd: Path, spoil: str
) -> None:
    SPOILED[spoil](sd)
    with pytest.raises(BridgekitError) as caught:
        draw([Input("audio", workshop.clip("owl"))])
    clear(caught.value)
    assert caught.value.where == str(sd)


def write_code(file: Path, base: str) -> None:
    """A class `Own` that is a stock one, in a file that leaves another one beside it when it runs."""
    file.write_text(
        f"from pathlib import Path\nimport diffusers\nPath({str(file)!r} + '.ran').touch()\nclass Own(diffusers.{base}): ..."
    )


def change_index(folder: Path, entries: dict[str, object]) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | entries))


#: Ways to bring code: changes of the index, files in the model's folder, and what the message says.
OWN_CODE: dict[str, tuple[dict[str, object], tuple[str, ...], str]] = {
    "a pipeline": ({"_class_name": ["pipeline", "Own"]}, ("pipeline.py",), "_class_name"),
    "a part": ({"unet": ["own", "Own"]}, ("unet/own.py",), "its unet .* is from 'own'"),
    "a part in the working directory": ({"unet": ["own", "Own"]}, (), "its unet .* is from 'own'"),
    "a part without a class": ({"unet": ["own", None]}, (), "its unet .* is from 'own'"),
    "two characters that are unpacked": ({"unet": "ox"}, (), "its unet .* is from 'o'"),
    "a file that nothing names": ({}, ("unet/own.py",), r"unet/own\.py"),
}


@pytest.mark.parametrize("way", OWN_CODE)
def test_a_models_own_code_is_not_run_unless_it_is_trusted_by_name(
    sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    entries, files, reason = OWN_CODE[way]
    change_index(sd, entries)
    for file in (tmp_path / "own.py", tmp_path / "o.py", *(sd / name for name in files)):
        write_code(file, "UNet2DConditionModel")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BridgekitError, match=reason) as caught:
        open_model(str(sd), "cpu")
    clear(caught.value)
    assert "trust_remote_code=yes" in str(caught.value.remedy)
    assert not list(tmp_path.rglob("*.ran")), "the code was run"


@pytest.mark.parametrize(
    ("entries", "file", "base"),
    [
        ({"_class_name": ["pipeline", "Own"]}, "pipeline.py", "StableDiffusionPipeline"),
        ({"unet": ["own", "Own"]}, "unet/own.py", "UNet2DConditionModel"),
    ],
)
def test_a_models_own_code_is_run_if_it_is_trusted_by_name(sd: Path, entries: dict[str, object], file: str, base: str) -> None:
    change_index(sd, entries)
    write_code(sd / file, base)
    pipeline = open_model(f"{sd},trust_remote_code=yes", "cpu").pipeline
    assert "Own" in (type(pipeline).__name__, type(pipeline.unet).__name__)
    with pytest.raises(BridgekitError, match="must be yes or no"):
        open_model(f"{sd},trust_remote_code=maybe", "cpu")


def test_a_hub_models_index_is_checked_before_diffusers_sees_it(
    sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot, refs = (tmp_path / "models--someone--sd" / name for name in ("snapshots", "refs"))
    shutil.copytree(sd, snapshot / ("0" * 40))
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    assert type(open_model("someone/sd", "cpu").pipeline).__name__ == "StableDiffusionPipeline"
    # A name without a slash is that of a pipeline which diffusers would fetch from its community's repository.
    change_index(snapshot / ("0" * 40), {"_class_name": ["clip_guided_stable_diffusion", "Own"]})
    monkeypatch.setattr(
        "diffusers.DiffusionPipeline.from_pretrained", lambda *arguments, **options: pytest.fail("it was called")
    )
    with pytest.raises(BridgekitError, match="_class_name"):
        open_model("someone/sd", "cpu")


@pytest.mark.parametrize("name", ["toy:patchs", "no such model", "./gone/model", "nobody/nothing"])
def test_an_unknown_model_is_one_clear_message(workshop: Workshop, draw: Callable[..., Generation], name: str) -> None:
    with pytest.raises(BridgekitError) as caught:
        draw([Input("audio", workshop.clip("owl"))], model=name)
    clear(caught.value)
    assert name in str(caught.value)


def test_a_pipeline_that_offers_nothing_is_one_clear_message(
    workshop: Workshop, draw: Callable[..., Generation], models: Callable[[str], Path]
) -> None:
    with pytest.raises(BridgekitError, match="prompt_embeds") as caught:
        draw([Input("audio", workshop.clip("owl"))], model=str(models("unconditional")))
    clear(caught.value)


def test_a_bridge_without_audio_and_one_without_text_say_so(
    workshop: Workshop, sd: Path, models: Callable[[str], Path], bridge: Path, tmp_path: Path
) -> None:
    run = partial(generate, steps=2, size=32, progress=False)
    pictured = workshop.bridge(tmp_path / "pictured", "audio", "image")
    with pytest.raises(BridgekitError, match="no modality 'text'") as caught:
        run(pictured, [Input("text", "owl")], model=str(sd))
    clear(caught.value)
    with pytest.raises(BridgekitError, match=r"has audio and image, .* made of text") as caught:
        run(pictured, [Input("audio", workshop.clip("owl"))], model=str(sd))
    clear(caught.value)
    with pytest.raises(BridgekitError, match=r"has audio and text, but .* made of image") as caught:
        run(bridge, [Input("audio", workshop.clip("owl"))], model=str(models("stable_unclip_img2img")))
    clear(caught.value)
    with pytest.raises(BridgekitError, match="no image encoder") as caught:
        run(pictured, [Input("audio", workshop.clip("owl"))], model=str(models("kandinsky22")))
    clear(caught.value)


def test_a_size_that_the_model_cannot_draw_is_one_clear_message(workshop: Workshop, draw: Callable[..., Generation]) -> None:
    with pytest.raises(BridgekitError, match="divisible by 8") as caught:
        draw([Input("audio", workshop.clip("owl"))], size=33)
    clear(caught.value)


def test_a_prompt_that_has_no_effect_is_one_clear_message(
    workshop: Workshop, models: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = workshop.bridge(tmp_path / "bridge", "audio", "image", "image")
    with pytest.raises(BridgekitError, match="takes no prompt"):
        generate(
            folder, [Input("audio", workshop.clip("owl"))], model=str(models("kandinsky22")), prompt="in oil", progress=False
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gap": "wide"}, "captions, mean, none"),
        ({"n": 0}, "at least 1"),
        ({"prompt_weight": 1.5}, "between 0 and 1"),
    ],
)
def test_options_out_of_range_are_one_message(
    workshop: Workshop, draw: Callable[..., Generation], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BridgekitError, match=message):
        draw([Input("audio", workshop.clip("owl"))], **options)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_are_numbers_above_zero(workshop: Workshop, draw: Callable[..., Generation], weight: float) -> None:
    with pytest.raises(BridgekitError, match="must be positive"):
        draw([Input("audio", workshop.clip("owl"), weight), Input("text", "owl")])


def test_silence_and_a_click_give_a_picture_or_a_message(
    workshop: Workshop, draw: Callable[..., Generation], tmp_path: Path
) -> None:
    for clip in (tone(tmp_path / "silence.wav", 0.0, 1.0), tone(tmp_path / "click.wav", 4_000, 0.01)):
        assert np.isfinite(pixels(draw([Input("audio", clip)]).pictures[0].file)).all()


# ---- models of plugins


def test_a_plugins_model_is_named_like_an_encoder_and_is_the_default(workshop: Workshop, bridge: Path) -> None:
    inputs = [Input("audio", workshop.clip("owl"))]
    by_name = generate(bridge, inputs, model="toy:patches", out="a.png", progress=False)
    by_default = generate(bridge, inputs, out="b.png", progress=False)
    assert story(by_default.pictures[0].file)["model"] == "toy:patches"
    assert np.array_equal(pixels(by_name.pictures[0].file), pixels(by_default.pictures[0].file))


def test_a_failing_model_is_blamed_on_its_plugin(
    workshop: Workshop, draw: Callable[..., Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bridgekit.plugins import find_image_generator

    known = find_image_generator("toy:patches")
    assert known is not None

    def failing(device: str) -> ImageModel:
        raise RuntimeError("out of paint")

    monkeypatch.setattr("bridgekit.diffusion.models.find_image_generator", lambda name: replace(known, open=failing))
    with pytest.raises(BridgekitError, match=r"toy:patches.*out of paint"):
        draw([Input("audio", workshop.clip("owl"))], model="toy:patches")
