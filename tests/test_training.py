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
from bridgekit.fusion import checkpoint, pieces, training
from bridgekit.fusion.adapter import Adapter, FrozenSide, FusionAdapter
from bridgekit.fusion.checkpoint import TrainingState
from bridgekit.fusion.training import PRESETS, Preset, Trained, learning_rate, train
from bridgekit.hardware import fast_products
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


def test_training_leaves_the_callers_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(replace(SMALL, epochs=1))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("stop", [1, 17, 59])
def test_a_stopped_run_resumes_and_ends_as_if_it_had_not_stopped(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", -1.0)
    file = tmp_path / "run.safetensors"

    class Stopped(Exception):
        pass

    def stop_after(epoch: int, loss: float) -> None:
        if epoch == stop + 1:
            raise Stopped

    with pytest.raises(Stopped):
        run(checkpoint=file, on_epoch=stop_after)
    assert file.exists()
    epochs: list[int] = []
    resumed = run(checkpoint=file, on_epoch=lambda epoch, loss: epochs.append(epoch))
    assert epochs[0] == stop + 1, "it resumed where it had stopped"
    whole = run()
    assert all(torch.equal(weights(whole)[key], weights(resumed)[key]) for key in weights(whole))
    assert (whole.history, whole.best_epoch) == (resumed.history, resumed.best_epoch)
    assert not file.exists(), "a finished run leaves no checkpoint"


def test_the_adapters_are_those_of_the_best_validation_and_the_first_of_equals() -> None:
    scores = iter([0.1, 0.9, 0.2, 0.9, 0.3])
    latents = two_views()
    seen: list[Tensor] = []

    def validate(adapters: Mapping[str, Adapter]) -> dict[str, float]:
        seen.append(adapters["a"](latents["a"]).clone())
        return {"score": next(scores)}

    rows = {name: torch.arange(200) for name in latents}
    trained = train(latents, rows, torch.arange(200)[:, None], validate=validate, preset=replace(SMALL, epochs=5))
    assert trained.best_epoch == 2
    with fast_products():  # as in validation: on a CPU with AMX, it multiplies in bfloat16
        assert torch.equal(trained.adapters["a"](latents["a"]), seen[1])
    assert trained.temperature == trained.history[1]["temperature"]


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_without_alpha_no_epoch_mixes_and_every_row_of_a_batch_takes_part(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    forward = FusionAdapter.forward

    def watched(adapter: FusionAdapter, rows: Tensor) -> Tensor:
        if adapter.training and rows.shape[1] == 24:
            seen.append(rows.clone())
        return forward(adapter, rows)

    monkeypatch.setattr(FusionAdapter, "forward", watched)
    small = replace(PRESETS[preset], shared_dim=8, blocks=1, batch_size=50, min_steps_per_epoch=1, epochs=6)
    latents = two_views()
    run(replace(small, alpha=0), latents)
    assert [len(rows) for rows in seen] == [50] * 4 * 6
    for epoch in range(6):
        rows = torch.cat(seen[4 * epoch : 4 * epoch + 4])
        assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, latents["a"][:200].tolist())), "the rows themselves"
    seen.clear()
    run(small, latents)
    whole, mixed = set(map(tuple, latents["a"].tolist())), list(map(tuple, torch.cat(seen).tolist()))
    # A permutation leaves one row of a batch in its place on average.
    assert sum(row in whole for row in mixed) < 0.1 * len(mixed), "otherwise rows are mixed"


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


def test_training_that_diverges_ends_with_what_was_best_before() -> None:
    trained = run(replace(SMALL, lr=100.0, warmup_steps=0))
    assert trained.diverged == len(trained.history) + 1 > 1
    assert all(tensor.isfinite().all() for tensor in weights(trained).values())
    assert all(math.isfinite(value) for record in trained.history for value in record.values())
    scores = [record["score"] for record in trained.history]
    assert trained.best_epoch == trained.history[scores.index(max(scores))]["epoch"]
    assert run().diverged is None


def test_no_checkpoint_is_ever_written_of_a_state_that_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", -1.0)
    file = tmp_path / "run.safetensors"
    looked: list[bool] = []

    def look(epoch: int, loss: float) -> None:
        if file.exists():
            looked.append(all(tensor.isfinite().all() for tensor in load_file(file).values()))

    trained = run(replace(SMALL, lr=60.0, warmup_steps=0), checkpoint=file, on_epoch=look)
    assert trained.diverged
    assert len(looked) > 1
    assert all(looked)
    assert not file.exists()


def test_weights_that_diverge_in_the_last_step_of_an_epoch_are_never_validated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", -1.0)
    # One step an epoch, whose loss is that of the weights before it. Warm-up lets the first one pass.
    wild = replace(SMALL, batch_size=400, lr=1e41, epochs=60, warmup_steps=100)
    written: list[dict[str, Tensor]] = []
    monkeypatch.setattr(
        checkpoint, "write_sealed", lambda path, tensors, told: (written.append(tensors), write_sealed(path, tensors, told))
    )
    trained = run(wild, checkpoint=tmp_path / "run.safetensors")
    assert (trained.diverged, trained.best_epoch, len(written)) == (2, 1, 1)
    assert all(tensor.isfinite().all() for tensor in weights(trained).values())
    with pytest.raises(BridgekitError, match="diverged"):
        run(replace(wild, warmup_steps=0))


def test_a_state_whose_optimizer_has_overflowed_is_not_written(tmp_path: Path) -> None:
    model, temperature = nn.Linear(2, 2), nn.Parameter(torch.ones(()))
    optimizer = training._optimizer(list(model.parameters()), temperature, SMALL)
    state = TrainingState(model, temperature, optimizer)
    for size, written in ((1.0, True), (1e30, False)):
        for parameter in (*model.parameters(), temperature):
            parameter.grad = torch.full_like(parameter, size)
        optimizer.step()
        assert state.is_finite()
        state.save(tmp_path / f"{size}.safetensors")
        assert (tmp_path / f"{size}.safetensors").exists() is written


def test_a_validation_score_of_nan_is_never_the_best() -> None:
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
    standardise=st.booleans(),
    ridge=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 9),
)
def test_whatever_the_latents_and_the_learning_rate_adapters_are_numbers_or_there_are_none(
    lr: float, scales: tuple[float, float], one_large: bool, standardise: bool, ridge: float, seed: int
) -> None:
    latents = two_views()
    for scale, matrix in zip(scales, latents.values(), strict=True):
        matrix[3 if one_large else slice(None)] *= scale
        matrix.clamp_(-3e38, 3e38)  # latents that are not finite never come here
    preset = replace(SMALL, lr=lr, epochs=6, warmup_steps=0, standardise=standardise, warm_start=ridge)
    try:
        trained = run(preset, latents, seed=seed)
    except BridgekitError as refusal:
        message = refusal.what
        assert "diverged" in message
        return
    assert all(tensor.isfinite().all() for tensor in weights(trained).values())
    assert all(math.isfinite(record["loss"]) for record in trained.history)
    best = max(trained.history, key=lambda record: record["score"])
    assert trained.best_epoch == best["epoch"]
    assert trained.temperature == best["temperature"]
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


def test_the_learning_rate_warms_up_and_comes_down_as_a_cosine_that_is_set_once_an_epoch() -> None:
    preset = PRESETS["paper"]
    rates = [[learning_rate(preset, epoch, step, 120) for step in range(120)] for epoch in range(1, 501)]
    assert rates[0][0] == preset.min_lr
    assert rates[0][50] == pytest.approx((preset.min_lr + preset.lr) / 2)
    assert rates[0][100:] == [preset.lr] * 20
    assert all(len(set(epoch)) == 1 for epoch in rates[1:])
    assert rates[250][0] == pytest.approx((preset.min_lr + preset.lr) / 2)
    assert preset.min_lr < rates[499][0] < 1.1e-6


def test_warm_up_goes_on_after_a_short_first_epoch_and_takes_a_tenth_of_a_short_run_at_most() -> None:
    preset = replace(PRESETS["paper"], epochs=20)
    rates = [learning_rate(preset, epoch, step, 10) for epoch in range(1, 21) for step in range(10)]
    assert rates[0] == preset.min_lr
    assert rates.index(max(rates)) == 20
    assert sorted(rates[:20]) == rates[:20]
    assert learning_rate(replace(preset, warmup_steps=0), 1, 0, 10) == preset.lr


def test_the_paper_preset_is_the_released_configuration() -> None:
    paper = PRESETS["paper"]
    assert (paper.shared_dim, paper.blocks, paper.expansion, paper.dropout) == (512, 4, 4.0, 0.6)
    assert (paper.alpha, paper.pairing, paper.lambda_per, paper.batch_size) == (1.0, "halves", "batch", 40_960)
    assert (paper.lr, paper.min_lr, paper.warmup_steps, paper.weight_decay, paper.epochs) == (1e-3, 1e-6, 100, 0.1, 500)
    assert (paper.temperature, paper.learn_temperature) == (0.07, True)
    assert (paper.min_steps_per_epoch, paper.input_dropout, paper.standardise, paper.warm_start) == (1, 0.0, False, 0.0)


def test_a_fixed_temperature_does_not_change() -> None:
    trained = run(replace(SMALL, learn_temperature=False, temperature=0.125, epochs=5))
    assert {record["temperature"] for record in trained.history} == {trained.temperature} == {0.125}
    learned = run(replace(SMALL, temperature=0.125, epochs=5))
    assert learned.temperature != 0.125
    assert not all(torch.equal(weights(learned)[key], weights(trained)[key]) for key in weights(trained))


def test_the_temperature_stays_within_its_bounds() -> None:
    trained = run(replace(SMALL, temperature=0.5, lr=0.5, warmup_steps=0))
    assert all(0.001 <= record["temperature"] <= 0.5 for record in trained.history)
    assert {0.5} < {record["temperature"] for record in trained.history}, "it is learned, and reaches a bound"
    assert run(replace(SMALL, temperature=3.0, lr=0.0, min_lr=0.0, epochs=1)).temperature == 0.5


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


def test_a_piece_that_is_embedded_twice_gets_the_same_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
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
