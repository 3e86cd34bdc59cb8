"""Previews of a picture while it is drawn, from a real model and from pipelines of other kinds."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from bridgekit_app.previews import preview
from PIL import Image
from torch import Tensor

from bridgekit.diffusion.models import DrawOptions, draw, find_conditionings, open_model
from bridgekit.image_models import ImageModel

pytest.importorskip("bridgekit_starter", reason="the starter, whose model draws here, is not installed")
pytest.importorskip("diffusers", reason="diffusers is not installed")

from tests import pipelines


def shown(model: ImageModel, **options: Any) -> tuple[list[Image.Image | None], Image.Image]:
    """What a watcher sees after each step, and the picture."""
    seen: list[Image.Image | None] = []
    conditioning = model.conditionings[0]
    tensors = conditioning.encode(["a red apple"])
    [picture] = draw(
        model,
        conditioning,
        tensors,
        DrawOptions(**options),
        watch=lambda done, total, latents: seen.append(preview(model, latents)),
    )
    return seen, picture


def test_every_preview_is_closer_to_the_final_image() -> None:
    seen, picture = shown(open_model("starter:openmoji-64"), steps=10)
    assert len(seen) == 10
    final = np.asarray(picture, dtype=float)
    errors = [np.abs(np.asarray(look, dtype=float) - final).mean() for look in seen]
    assert errors[-1] < 2
    assert errors[0] > 2 * errors[-1]
    assert sum(later < earlier for earlier, later in pairwise(errors)) >= 7


@pytest.mark.parametrize("kind", [pipelines.stable_diffusion, pipelines.sdxl, pipelines.sd3])
def test_a_pipeline_with_another_scheduler_shows_its_latents_as_they_are(kind: Callable[[], Any]) -> None:
    pipeline = kind()
    seen, picture = shown(ImageModel("tiny", pipeline, find_conditionings(pipeline)), steps=3, size=64)
    assert len(seen) == 3
    assert all(look is not None and look.size == picture.size for look in seen)
    # After the last step there is nothing more to come.
    assert seen[-1] is not None
    assert np.abs(np.asarray(seen[-1], dtype=float) - np.asarray(picture, dtype=float)).mean() < 1


def test_a_pipeline_whose_latents_are_packed_draws_without_being_watched() -> None:
    pipeline = pipelines.flux()
    seen, picture = shown(ImageModel("tiny", pipeline, find_conditionings(pipeline)), steps=2, size=32)
    assert seen == [None, None]
    assert picture.size == (32, 32)


def test_an_exception_in_the_preview_callback_stops_the_drawing() -> None:
    class Enough(Exception):
        pass

    steps: list[int] = []

    def watch(done: int, total: int, latents: Tensor) -> None:
        steps.append(done)
        if done == 3:
            raise Enough

    model = open_model("starter:openmoji-64")
    tensors = model.conditionings[0].encode(["a red apple"])
    with pytest.raises(Enough):
        draw(model, model.conditionings[0], tensors, DrawOptions(steps=10), watch=watch)
    assert steps == [1, 2, 3]


def test_an_autoencoder_that_fails_in_half_precision_is_left_alone() -> None:
    pipeline = pipelines.sdxl()
    pipeline.vae.to(torch.float16)
    pipeline.vae.register_to_config(force_upcast=True)
    model = ImageModel("tiny", pipeline, find_conditionings(pipeline))
    assert preview(model, torch.zeros(1, pipeline.vae.config.latent_channels, 8, 8)) is None
