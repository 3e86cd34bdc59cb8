"""Training learns, repeats itself, goes on where it was stopped, and leaves a frozen side alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from bridgekit.errors import BridgekitError
from bridgekit.fusion import pieces, training
from bridgekit.fusion.adapter import FrozenSide, FusionAdapter
from bridgekit.fusion.training import PRESETS, Preset, Trained, learning_rate, train
from bridgekit.latents.encode import encode_items
from bridgekit.plugins import load_encoder
from bridgekit.storage.sealed import write_sealed

SMALL = Preset(
    shared_dim=16, blocks=1, expansion=2, dropout=0.1, batch_size=64, epochs=60, lr=3e-3, lambda_per="pair", standardise=True
)

COLOURS = ("red", "blue", "old", "wet", "tiny")
WORDS = [f"{colour} {thing}" for colour, thing in product(COLOURS, ("dog", "cup", "train", "boat", "violin", "hat", "owl"))]


def two_views(n: int = 256, seed: int = 0) -> dict[str, Tensor]:
    """Two random linear views of the same hidden things."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, 8, generator=generator)
    return {
        name: hidden @ torch.randn(8, dim, generator=generator) + 0.1 * torch.randn(n, dim, generator=generator)
        for name, dim in {"a": 24, "b": 12}.items()
    }


def run(preset: Preset = SMALL, latents: Mapping[str, Tensor] | None = None, **options: object) -> Trained:
    latents = latents or two_views()
    held_out = slice(200, 256)

    def validate(adapters: Mapping[str, nn.Module]) -> dict[str, float]:
        x, y = (normalize(adapters[name](latents[name][held_out]), dim=-1) for name in ("a", "b"))
        return {"score": float(((x @ y.T).argmax(1) == torch.arange(len(x))).float().mean())}

    rows = {name: torch.arange(200) for name in ("a", "b")}
    keys = torch.arange(200)[:, None]
    return train(latents, rows, keys, validate=validate, preset=preset, **options)  # type: ignore[arg-type]


def weights(trained: Trained) -> dict[str, Tensor]:
    return {f"{name}.{key}": value for name, adapter in trained.adapters.items() for key, value in adapter.state_dict().items()}


def test_two_views_of_the_same_things_find_each_other() -> None:
    trained = run()
    assert max(record["score"] for record in trained.history) > 0.9
    assert trained.history[0]["loss"] > trained.history[-1]["loss"]


def test_the_same_seed_gives_the_same_weights_and_another_gives_others() -> None:
    first, second, other = run(seed=3), run(seed=3), run(seed=4)
    assert all(torch.equal(weights(first)[key], weights(second)[key]) for key in weights(first))
    assert not all(torch.equal(weights(first)[key], weights(other)[key]) for key in weights(first))


def test_training_does_not_touch_the_callers_random_numbers() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(replace(SMALL, epochs=1))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("stop", [1, 17, 59])
def test_a_run_that_is_stopped_goes_on_and_ends_as_if_it_had_not_been(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    checkpoint = tmp_path / "run.safetensors"

    class Stopped(Exception):
        pass

    def stop_after(epoch: int, loss: float) -> None:
        if epoch == stop + 1:
            raise Stopped

    with pytest.raises(Stopped):
        run(checkpoint=checkpoint, on_epoch=stop_after)
    assert checkpoint.exists()
    epochs: list[int] = []
    resumed = run(checkpoint=checkpoint, on_epoch=lambda epoch, loss: epochs.append(epoch))
    assert epochs[0] == stop + 1, "it began where it had stopped"
    whole = run()
    assert all(torch.equal(weights(whole)[key], weights(resumed)[key]) for key in weights(whole))
    assert whole.history == resumed.history
    assert not checkpoint.exists(), "a finished run leaves no checkpoint"


def test_early_stopping_keeps_the_best_epoch_and_ends_soon_after() -> None:
    calls = iter([0.1, 0.5, 0.9, 0.2, 0.2, 0.2, 0.2])
    latents = two_views()
    trained = train(
        latents,
        {name: torch.arange(200) for name in latents},
        torch.arange(200)[:, None],
        validate=lambda adapters: {"score": next(calls)},
        preset=replace(SMALL, epochs=50, patience=4),
    )
    assert trained.best_epoch == 3
    assert len(trained.history) == 7


def test_a_frozen_side_does_not_move_and_sets_the_width() -> None:
    trained = run(fixed={"b": FrozenSide(12)})
    assert isinstance(trained.adapters["b"], FrozenSide)
    moved = trained.adapters["a"]
    assert isinstance(moved, FusionAdapter)
    assert moved(torch.zeros(1, 24)).shape == (1, 12)
    assert max(record["score"] for record in trained.history) > 0.5


def test_a_loss_that_is_never_finite_is_refused_with_advice(tmp_path: Path) -> None:
    latents = two_views()
    latents["a"][5] = torch.inf
    with pytest.raises(BridgekitError, match="diverged: the loss is not finite in epoch 1") as refusal:
        run(replace(SMALL, standardise=False), latents=latents, checkpoint=tmp_path / "run.safetensors")
    assert "extreme latents" in str(refusal.value.remedy)
    assert not list(tmp_path.iterdir()), "nothing was written"


@pytest.mark.parametrize("keep_best", [True, False])
def test_training_that_diverges_ends_with_what_was_best_before(keep_best: bool) -> None:
    wild = replace(SMALL, lr=100.0, warmup_steps=0, keep_best=keep_best)
    trained = run(wild)
    assert trained.diverged == len(trained.history) + 1 > 1
    assert all(tensor.isfinite().all() for tensor in weights(trained).values())
    assert all(math.isfinite(value) for record in trained.history for value in record.values())
    scores = [record["score"] for record in trained.history]
    kept = scores.index(max(scores)) if keep_best else len(scores) - 1
    assert trained.best_epoch == trained.history[kept]["epoch"]
    assert run().diverged is None


def test_no_checkpoint_is_ever_written_of_a_state_that_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    checkpoint = tmp_path / "run.safetensors"
    looked: list[bool] = []

    def look(epoch: int, loss: float) -> None:
        if checkpoint.exists():
            looked.append(all(tensor.isfinite().all() for tensor in load_file(checkpoint).values()))

    trained = run(replace(SMALL, lr=60.0, warmup_steps=0), checkpoint=checkpoint, on_epoch=look)
    assert trained.diverged
    assert len(looked) > 1
    assert all(looked)
    assert not checkpoint.exists()


def test_weights_that_run_off_in_the_last_step_of_an_epoch_are_never_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    # One step an epoch, whose loss is that of the weights before it. Warm-up lets the first one pass.
    wild = replace(SMALL, batch_size=400, lr=1e41, epochs=60, warmup_steps=100)
    written: list[dict[str, Tensor]] = []
    monkeypatch.setattr(
        training, "write_sealed", lambda path, tensors, told: (written.append(tensors), write_sealed(path, tensors, told))
    )
    trained = run(wild, checkpoint=tmp_path / "run.safetensors")
    assert (trained.diverged, trained.best_epoch, len(written)) == (2, 1, 1)
    assert all(tensor.isfinite().all() for tensor in weights(trained).values())
    with pytest.raises(BridgekitError, match="diverged"):
        run(replace(wild, warmup_steps=0))


def test_a_state_whose_optimizer_has_overflowed_is_not_written(tmp_path: Path) -> None:
    model, log_scale = nn.Linear(2, 2), nn.Parameter(torch.zeros(()))
    optimizer = training._optimizer(model, log_scale, SMALL)
    state = training._State(model, log_scale, optimizer, keep_best=True)
    for size, written in ((1.0, True), (1e30, False)):
        for parameter in (*model.parameters(), log_scale):
            parameter.grad = torch.full_like(parameter, size)
        optimizer.step()
        assert state.is_finite()
        state.save(tmp_path / f"{size}.safetensors")
        assert (tmp_path / f"{size}.safetensors").exists() is written


def test_a_validation_that_gives_no_number_is_never_the_best() -> None:
    scores = iter([math.nan, 0.2, math.nan, 0.1])
    latents = two_views()
    every = {name: torch.arange(200) for name in latents}
    keys, short = torch.arange(200)[:, None], replace(SMALL, epochs=4)
    trained = train(latents, every, keys, validate=lambda adapters: {"score": next(scores)}, preset=short)
    assert trained.best_epoch == 2
    with pytest.raises(BridgekitError, match="no validation gave a number"):
        train(latents, every, keys, validate=lambda adapters: {"score": math.nan}, preset=short)


@settings(deadline=None, max_examples=40)
@given(
    lr=st.floats(-4, 38).map(lambda power: 10.0**power),
    scales=st.tuples(*[st.floats(-30, 38).map(lambda power: 10.0**power)] * 2),
    one_large=st.booleans(),
    keep_best=st.booleans(),
    standardise=st.booleans(),
    ridge=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 9),
)
def test_whatever_the_latents_and_the_learning_rate_adapters_are_numbers_or_there_are_none(
    lr: float, scales: tuple[float, float], one_large: bool, keep_best: bool, standardise: bool, ridge: float, seed: int
) -> None:
    latents = two_views()
    for scale, matrix in zip(scales, latents.values(), strict=True):
        matrix[3 if one_large else slice(None)] *= scale
        matrix.clamp_(-3e38, 3e38)  # latents that are not finite never come here
    preset = replace(SMALL, lr=lr, epochs=6, warmup_steps=0, keep_best=keep_best, standardise=standardise, warm_start=ridge)
    try:
        trained = run(preset, latents, seed=seed)
    except BridgekitError as refusal:
        told = refusal.what
        assert "diverged" in told
        return
    assert all(tensor.isfinite().all() for tensor in weights(trained).values())
    scores = [record["score"] for record in trained.history]
    assert all(math.isfinite(record["loss"]) for record in trained.history)
    assert trained.history[[record["epoch"] for record in trained.history].index(trained.best_epoch)]["score"] == (
        max(scores) if keep_best else scores[-1]
    )
    assert (trained.diverged is None) == (len(trained.history) == preset.epochs)


def test_real_latents_and_an_absurd_learning_rate_end_with_adapters_that_are_numbers() -> None:
    encoder = load_encoder("starter:text", "cpu")
    latents = {
        name: encode_items(encoder, [sentence.format(word) for word in WORDS]).matrix
        for name, sentence in {"a": "a photo of a {}", "b": "{}"}.items()
    }
    rows = {name: torch.arange(len(WORDS)) for name in latents}

    def validate(adapters: Mapping[str, nn.Module]) -> dict[str, float]:
        x, y = (normalize(adapters[name](latents[name]), dim=-1) for name in latents)
        return {"score": float(((x @ y.T).argmax(1) == torch.arange(len(x))).float().mean())}

    def wild(lr: float) -> Trained:
        preset = replace(PRESETS["default"], lr=lr, epochs=10, warmup_steps=0)
        return train(latents, rows, torch.arange(len(WORDS))[:, None], validate=validate, preset=preset)

    assert wild(PRESETS["default"].lr).history[-1]["score"] > 0.9
    diverged = wild(300.0)
    assert diverged.diverged
    assert all(tensor.isfinite().all() for tensor in weights(diverged).values())
    with pytest.raises(BridgekitError, match="diverged"):
        wild(1e20)


def test_the_learning_rate_warms_up_and_comes_down_as_a_cosine() -> None:
    preset = PRESETS["paper"]
    rates = [learning_rate(step, 10_000, preset) for step in range(10_000)]
    assert rates[0] == preset.min_lr
    assert rates[100] == max(rates) == preset.lr
    assert rates[-1] < 1e-5
    assert abs(rates[5_050] - preset.lr / 2) < 1e-5


def test_the_paper_preset_is_the_released_configuration() -> None:
    paper = PRESETS["paper"]
    assert (paper.shared_dim, paper.blocks, paper.expansion, paper.dropout) == (512, 4, 4.0, 0.6)
    assert (paper.alpha, paper.pairing, paper.lambda_per, paper.batch_size) == (1.0, "halves", "batch", 40_960)
    assert (paper.lr, paper.min_lr, paper.warmup_steps, paper.weight_decay, paper.epochs) == (1e-3, 1e-6, 100, 0.1, 500)
    assert paper.temperature == 0.07


def test_the_temperature_stays_within_its_bounds() -> None:
    trained = run(replace(SMALL, temperature=0.5, lr=0.5, warmup_steps=0))
    assert all(0.001 <= record["temperature"] <= 0.5 + 1e-6 for record in trained.history)


def test_a_batch_that_does_not_fit_is_embedded_twice_and_trains_to_the_same_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRIDGEKIT_PRECISION", "float32")
    plain = replace(SMALL, dropout=0.0, epochs=10)
    calls: list[int] = []
    forward = FusionAdapter.forward

    def watched(adapter: FusionAdapter, rows: Tensor) -> Tensor:
        if adapter.training:
            calls.append(len(rows))
        return forward(adapter, rows)

    monkeypatch.setattr(FusionAdapter, "forward", watched)
    whole = run(plain)
    assert set(calls) == {32}
    calls.clear()
    monkeypatch.setattr(pieces, "CPU_ROOM", 10 * pieces.activation_bytes(list(whole.adapters.values())))
    bounded = run(plain)
    assert max(calls) == 10, "no more rows at a time than fit"
    # Three batches an epoch of 32 mixed pairs: four pieces, two sides, each embedded twice.
    assert len(calls) == 10 * 3 * 4 * 2 * 2
    for key, value in weights(whole).items():
        torch.testing.assert_close(weights(bounded)[key], value, rtol=1e-4, atol=1e-4)


def test_dropout_is_drawn_again_alike_when_a_piece_is_embedded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    forward = FusionAdapter.forward

    def watched(adapter: FusionAdapter, rows: Tensor) -> Tensor:
        out = forward(adapter, rows)
        if adapter.training and out.shape[1] == SMALL.shared_dim:
            seen.append(out.detach().clone())
        return out

    monkeypatch.setattr(FusionAdapter, "forward", watched)
    monkeypatch.setattr(pieces, "CPU_ROOM", 1)
    run(replace(SMALL, epochs=1, batch_size=8, dropout=0.5))
    first = seen[: 2 * 2 * 4]
    once, again = first[:8], first[8:]
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))
