"""The map from a bridge's space to a model's conditioning: it reproduces what it was fitted on, and is saved safely."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

pytest.importorskip("diffusers")

from bridgekit import Bridge, BridgekitError
from bridgekit.diffusion import conditioner
from bridgekit.diffusion.conditioner import (
    GAPS,
    Conditioner,
    Fit,
    close_gap,
    fit_conditioner,
    load_conditioner,
    same_weights,
    save_conditioner,
)
from bridgekit.diffusion.models import find_conditionings
from bridgekit.diffusion.painter import open_painter
from bridgekit.image_models import Conditioning, ImageModel
from bridgekit.retrieval import Hit
from tests import pipelines
from tests.painting import LetterConditioning, PatchPipeline, Workshop
from tests.toys import NAMES

pytestmark = pytest.mark.usefixtures("picture_toys")

#: For each family: number of captions, steps of fitting, and the expected cosine to the model's own encoding of the captions.
FAMILIES = {
    "stable_diffusion": (8, 40, 0.99),
    "sdxl": (6, 40, 0.99),
    "sd3": (3, 40, 0.99),  # the longer the sequences, the fewer captions
    "flux": (3, 25, 0.99),
    "pixart": (8, 100, 0.99),
}
QUICK = Fit(steps=4, batch_size=4)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks, wide enough for twenty captions."""
    monkeypatch.setattr(conditioner, "WIDTH", 64)


@pytest.fixture
def bridge(workshop: Workshop, tmp_path: Path) -> Bridge:
    """A bridge of sounds and names."""
    return Bridge.load(workshop.bridge(tmp_path / "bridge"))


def own(family: str) -> Conditioning:
    """What a tiny pipeline of the family takes."""
    return find_conditionings(getattr(pipelines, family)())[0]


def everything(fitted: Conditioner) -> dict[str, Tensor]:
    """All tensors of a conditioner by name."""
    parts = {
        "mean": fitted.mean,
        "std": fitted.std,
        "probe": fitted.probe,
        "net": fitted.net.state_dict() if fitted.net else {},
    }
    return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()} | {
        "embeddings": fitted.embeddings
    }


def identical(one: Conditioner, other: Conditioner) -> bool:
    mine, theirs = everything(one), everything(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


# ---- fitting


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_encoders_own_embeddings_of_the_training_captions_come_back(
    bridge: Bridge, tmp_path: Path, family: str
) -> None:
    conditioning = own(family)
    count, steps, cosine = FAMILIES[family]
    captions = NAMES[:count]
    # Without noise, since the same captions are the test.
    fit = Fit(steps=steps, batch_size=min(count, 10), lr=1e-2, noise=0.0)
    fitted = fit_conditioner(bridge, conditioning, captions, fit=fit)
    truth, made = conditioning.encode(captions), fitted(bridge.embed("text", captions))
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in made.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in truth.items()
    }
    masks = [name for name, tensor in truth.items() if tensor.dtype == torch.bool]
    assert masks == (["prompt_attention_mask"] if family == "pixart" else [])
    for name in truth.keys() - set(masks):
        read = truth[masks[0]] if masks and truth[name].ndim == 3 else torch.ones(truth[name].shape[:-1], dtype=torch.bool)
        similar = cosine_similarity(made[name], truth[name], dim=-1)[read].mean()
        assert similar > cosine, name
        # The captions' encodings are much alike, so their mean comes near each: what matters is what tells them apart.
        missed, apart = ((truth[name] - guess)[read].square().sum() for guess in (made[name], truth[name].mean(0)))
        assert missed < 0.5 * apart, name
    for name in masks:
        assert float((made[name] == truth[name]).float().mean()) > 0.95
    assert fitted.cosine > cosine
    save_conditioner(fitted, tmp_path / "kept.safetensors")
    kept = load_conditioner(tmp_path / "kept.safetensors")
    assert kept is not None
    assert identical(kept, fitted)
    again = kept(bridge.embed("text", captions))
    assert all(torch.equal(again[name], made[name]) for name in made)
    assert (kept.kind, kept.made_of, list(kept.items), kept.cosine) == ("prompt_embeds", "text", captions, fitted.cosine)
    assert same_weights(kept, conditioning)


def test_fitting_is_repeatable_and_leaves_the_callers_random_state_alone(bridge: Bridge) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = fit_conditioner(bridge, LetterConditioning(), NAMES, fit=QUICK)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert identical(one, fit_conditioner(bridge, LetterConditioning(), NAMES, fit=QUICK))
    assert not identical(one, fit_conditioner(bridge, LetterConditioning(), NAMES, fit=replace(QUICK, seed=1)))


def test_too_many_captions_are_sampled_in_order(bridge: Bridge) -> None:
    fitted = fit_conditioner(bridge, LetterConditioning(), NAMES, fit=replace(QUICK, captions=5))
    assert len(fitted.items) == len(fitted.embeddings) == 5
    assert list(fitted.items) == sorted(set(fitted.items))
    assert set(fitted.items) < set(NAMES)


def test_an_unusable_caption_is_one_message(bridge: Bridge) -> None:
    with pytest.raises(BridgekitError, match="empty"):
        fit_conditioner(bridge, LetterConditioning(), ["owl", " "], fit=QUICK)


def test_a_model_that_cannot_encode_captions_is_one_message(bridge: Bridge) -> None:
    conditioning: Any = own("stable_diffusion")
    conditioning.pipeline.tokenizer = None
    with pytest.raises(BridgekitError, match="cannot encode"):
        fit_conditioner(bridge, conditioning, NAMES, fit=QUICK)


def test_it_knows_the_nearest_captions(bridge: Bridge) -> None:
    fitted = fit_conditioner(bridge, LetterConditioning(), NAMES, fit=QUICK)
    [owl, _] = fitted.nearest(bridge.embed("text", ["owl", "seal"]), k=3)
    assert owl[0] == Hit("owl", pytest.approx(1.0))
    assert [hit.similarity for hit in owl] == sorted((hit.similarity for hit in owl), reverse=True)
    assert len(fitted.nearest(bridge.embed("text", "owl"), k=100)[0]) == len(NAMES)


# ---- on disk


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)


def lacking(file: Path) -> None:
    save_file({"embeddings": torch.zeros(2, 3)}, file, {"conditioner": json.dumps({"format": 1})})


def newer(file: Path) -> None:
    data = file.read_bytes()
    assert data.count(rb"\"format\": 2") == 1
    file.write_bytes(data.replace(rb"\"format\": 2", rb"\"format\": 9"))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "cut short": cut,
    "with a flipped bit": flipped,
    "no safetensors": lambda file: file.write_bytes(b"{" * 1_000),
    "another's": lambda file: save_file({"weight": torch.zeros(2)}, file),
    "lacking parts": lacking,
    "of another format": newer,
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_conditioner_file_is_ignored(bridge: Bridge, tmp_path: Path, damage: str) -> None:
    file = tmp_path / "kept.safetensors"
    save_conditioner(fit_conditioner(bridge, LetterConditioning(), NAMES, fit=QUICK), file)
    assert load_conditioner(file) is not None
    DAMAGE[damage](file)
    assert load_conditioner(file) is None


# ---- the model's weights


def test_other_text_encoder_weights_are_noticed_and_half_precision_is_not(bridge: Bridge) -> None:
    conditioning: Any = own("stable_diffusion")
    fitted = fit_conditioner(bridge, conditioning, NAMES, fit=QUICK)
    conditioning.pipeline.unet = pipelines.unet()
    assert same_weights(fitted, conditioning)
    conditioning.pipeline.text_encoder.to(torch.bfloat16)
    assert same_weights(fitted, conditioning)
    conditioning.pipeline.text_encoder.to(torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in conditioning.pipeline.text_encoder.parameters():
            weight += 0.3 * weight.std(correction=0) * torch.randn(weight.shape, generator=generator)
    assert not same_weights(fitted, conditioning)


@pytest.mark.parametrize("other", ["sdxl", "sd_ip_adapter"])
def test_another_kind_of_model_has_other_weights(bridge: Bridge, other: str) -> None:
    assert not same_weights(fit_conditioner(bridge, own("stable_diffusion"), NAMES, fit=QUICK), own(other))


# ---- the gap


def memory(embeddings: Tensor) -> Conditioner:
    """A conditioner of which only the captions' embeddings matter."""
    return Conditioner("letters", "text", [str(row) for row in range(len(embeddings))], embeddings)


def units(seed: int, n: int, dim: int = 32) -> Tensor:
    return normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


anything = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@anything
@given(st.integers(0, 2**31), st.integers(1, 8), st.sampled_from(GAPS), st.floats(0.001, 0.5))
def test_embeddings_stay_at_unit_length_and_those_of_captions_stay_as_they_are(
    bridge: Bridge, seed: int, n: int, gap: str, temperature: float
) -> None:
    embeddings, captions = units(seed, n), memory(units(seed + 1, 9))
    closed = close_gap(replace(bridge, temperature=temperature), captions, "audio", embeddings, gap)
    torch.testing.assert_close(closed.norm(dim=-1), torch.ones(n))
    assert torch.equal(closed, embeddings) == (gap == "none")
    assert torch.equal(close_gap(bridge, captions, "text", embeddings, gap), embeddings)


@anything
@given(st.integers(0, 2**31))
def test_at_a_very_low_temperature_an_embedding_becomes_the_nearest_captions(bridge: Bridge, seed: int) -> None:
    embeddings, captions = units(seed, 4), units(seed + 1, 9)
    best = (embeddings @ captions.T).topk(2)
    assume(bool((best.values[:, 0] - best.values[:, 1] > 0.01).all()))
    closed = close_gap(replace(bridge, temperature=1e-4), memory(captions), "audio", embeddings, "captions")
    torch.testing.assert_close(closed, captions[best.indices[:, 0]])


@anything
@given(st.integers(0, 2**31), st.floats(0.2, 1.0))
def test_the_mean_of_one_modality_moves_onto_that_of_the_other(bridge: Bridge, seed: int, offset: float) -> None:
    text = units(seed, 400)
    audio = normalize(text + offset * units(seed + 1, 1), dim=-1)
    apart = replace(bridge, means={"audio": audio.mean(0), "text": text.mean(0)})
    moved = close_gap(apart, memory(text), "audio", audio, "mean")
    assert (moved.mean(0) - text.mean(0)).norm() < 0.3 * (audio.mean(0) - text.mean(0)).norm()


def test_a_bridge_remembers_its_means_and_one_without_leaves_embeddings_where_they_are(bridge: Bridge) -> None:
    captions = memory(bridge.embed("text", NAMES))
    torch.testing.assert_close(bridge.means["text"], captions.embeddings.mean(0), rtol=0, atol=0.1)
    embeddings = units(0, 3)
    assert not torch.equal(close_gap(bridge, captions, "audio", embeddings, "mean"), embeddings)
    assert torch.equal(close_gap(replace(bridge, means={}), captions, "audio", embeddings, "mean"), embeddings)


# ---- a side frozen in the conditioning's own space


def test_nothing_is_fitted_if_a_side_is_already_the_conditioning(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridgekit.diffusion.painter.fit_conditioner", None)
    folder = workshop.bridge(tmp_path / "bridge", frozen="text")
    bridge, model = Bridge.load(folder), ImageModel("toy", PatchPipeline(), [LetterConditioning()])
    painter = open_painter(bridge, model, folder)
    direct = painter.conditioner
    assert direct.net is None
    assert sorted(direct.items) == NAMES
    encoder = bridge.encoder("text")
    raw = encoder.encode([encoder.prepare(name) for name in NAMES])
    assert direct.scale == pytest.approx(float(raw.norm(dim=-1).mean()))
    made = direct(bridge.embed("text", NAMES))["letters"]
    torch.testing.assert_close(normalize(made, dim=-1), LetterConditioning().encode(NAMES)["letters"])
    kept = open_painter(bridge, model, folder)
    assert not kept.fitted
    assert identical(kept.conditioner, direct)
    assert kept.conditioner.scale == direct.scale
