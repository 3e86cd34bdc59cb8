"""Trains the fusion adapters on latents: FuseMix, symmetric InfoNCE and AdamW; the epoch is chosen by validation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor, nn

from bridgekit.errors import BridgekitError
from bridgekit.fusion.adapter import Adapter, FusionAdapter
from bridgekit.fusion.checkpoint import TrainingState
from bridgekit.fusion.closed_form import ClosedForm, spread_rows
from bridgekit.fusion.contrastive import info_nce, needed_keys
from bridgekit.fusion.distributed import Shares, broadcast_from_first, rank, sum_gradients
from bridgekit.fusion.fusemix import LambdaPer, Pairing, draw_lambda, draw_partners, fusemix
from bridgekit.fusion.pieces import activation_bytes, activation_room, backward_in_pieces, cut, seed_here
from bridgekit.hardware import HALF, fast_products, product_dtype, widened

#: On a GPU, adapters are compiled for runs of at least this many steps: compiling takes about a minute.
COMPILE_STEPS = 2_000
#: At most this many validations a run.
VALIDATIONS = 50
#: The learned temperature is clamped to these, as in FuseMix's release.
TEMPERATURE_BOUNDS = (0.001, 0.5)


@dataclass(frozen=True)
class Preset:
    """Hyperparameters of training.

    Arguments:
        shared_dim: width of the shared space; a frozen side's width overrides it.
        blocks, expansion, dropout, input_dropout: as in `FusionAdapter`.
        alpha: lambda ~ Beta(alpha, alpha); 0 turns mixup off.
        pairing: `halves` or `permutation`, see `draw_partners`.
        lambda_per: one lambda per `batch` or per `pair`.
        batch_size: rows per step, before mixup.
        min_steps_per_epoch: a small table is cut into at least this many batches.
        epochs: passes over the training rows.
        lr, min_lr, warmup_steps: see `learning_rate`.
        weight_decay: AdamW's, applied to weight matrices only.
        temperature: the initial temperature; constant if it is not learned.
        learn_temperature: learn the temperature itself (not its logarithm), at the learning rate of the weights.
        standardise: standardise latents by the mean and standard deviation of the training rows.
        warm_start: start from the closed-form linear solution with this much regularisation (see `ClosedForm`); 0 starts from
            random weights. `align` and `bind` choose the strength themselves unless it is 0.
    """

    shared_dim: int = 512
    blocks: int = 4
    expansion: float = 4.0
    dropout: float = 0.6
    input_dropout: float = 0.0
    alpha: float = 1.0
    pairing: Pairing = "halves"
    lambda_per: LambdaPer = "batch"
    batch_size: int = 40_960
    min_steps_per_epoch: int = 1
    epochs: int = 500
    lr: float = 1e-3
    min_lr: float = 1e-6
    warmup_steps: int = 100
    weight_decay: float = 0.1
    temperature: float = 0.07
    learn_temperature: bool = True
    standardise: bool = False
    warm_start: float = 0.0


#: `paper` is FuseMix's released configuration. Training differs from the release in a few points: rows that share an item or
#: a group are never each other's negatives; the epoch is chosen by the recall in all directions, at `VALIDATIONS` epochs at
#: most; on the CPU the dropout rate is 154/256; matrix products run in bfloat16 where that is faster (see `hardware`); and a
#: table with fewer rows than a batch is one batch, with a warm-up that goes on after the first epoch.
#: `default` is for a few thousand pairs; benchmarks/RESULTS.md shows how it was chosen.
PRESETS: dict[str, Preset] = {
    "default": Preset(
        shared_dim=384,
        blocks=1,
        expansion=1.0,
        dropout=0.6,
        input_dropout=0.25,
        pairing="permutation",
        lambda_per="pair",
        batch_size=1_024,
        min_steps_per_epoch=3,
        epochs=30,
        lr=3e-3,
        warmup_steps=20,
        learn_temperature=False,  # at this rate it would fall to 0.02 within ten epochs, and recall with it
        standardise=True,
        warm_start=1.0,
    ),
    "paper": Preset(),
}


@dataclass(frozen=True)
class Trained:
    """The result of training.

    Arguments:
        adapters: modality to its adapter, in eval mode, on the CPU. Fixed ones are returned as given.
        temperature: the temperature of the best epoch.
        history: one record per validation: epoch, loss, temperature, lr, and what `validate` returned.
        best_epoch: the epoch that the adapters are from.
        diverged: the epoch in which the loss or a weight became non-finite and training stopped, or None.
    """

    adapters: dict[str, Adapter]
    temperature: float
    history: list[dict[str, float]]
    best_epoch: int
    diverged: int | None = None


def initial_adapters(
    latents: Mapping[str, Tensor],
    rows: Mapping[str, Tensor],
    preset: Preset,
    seed: int,
    fixed: Mapping[str, Adapter] | None = None,
) -> dict[str, Adapter]:
    """The initial adapters, in eval mode: the fixed ones, and random ones or the closed form, depending on the preset.

    Arguments:
        latents, rows, preset, seed, fixed: as for `train`.
    """
    fixed = fixed or {}
    width = next((adapter.shared_dim for adapter in fixed.values()), preset.shared_dim)
    new: dict[str, FusionAdapter] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, matrix in latents.items():
            if name not in fixed:
                shape = (width, preset.blocks, preset.expansion, preset.dropout, preset.input_dropout)
                new[name] = FusionAdapter(matrix.shape[1], *shape).to(torch.promote_types(matrix.dtype, torch.float32))
    adapters = {name: fixed[name] if name in fixed else new[name].eval() for name in latents}
    if preset.standardise or preset.warm_start:
        latents, rows = spread_rows(latents, rows)
    if preset.standardise:
        for name, adapter in new.items():
            adapter.standardise(widened(latents[name][rows[name][rows[name] >= 0]]))
    if preset.warm_start:
        ClosedForm(adapters, latents, rows, fixed).set_adapters(preset.warm_start)
    return adapters


def train(
    latents: Mapping[str, Tensor],
    rows: Mapping[str, Tensor],
    keys: Tensor,
    *,
    validate: Callable[[Mapping[str, Adapter]], Mapping[str, float]],
    preset: Preset,
    seed: int = 0,
    fixed: Mapping[str, Adapter] | None = None,
    device: str = "cpu",
    checkpoint: Path | None = None,
    on_epoch: Callable[[int, float], object] = lambda epoch, loss: None,
) -> Trained:
    """Train fusion adapters that map the latents of two or more modalities into one space.

    Every row is mixed with another that has the same modalities, by one lambda for all of them. The loss is the symmetric
    InfoNCE of each pair of modalities over the mixed rows that have both, averaged over the pairs of modalities. (Weighting
    the pairs by their number of rows was worse: with 12,000 rows of speech and text and 1,500 of text and images, recall@1
    from speech to images was 60 instead of 66 %, and from images to text no better.)

    A batch goes through the adapters in pieces, each with its own random numbers. If its activations would need more than
    `activation_room`, only the embeddings are kept, and each piece is embedded again when the gradients of the loss are
    known, so that memory does not grow with the batch. Under `torchrun` each process embeds some of the pieces; the result
    is that of a single process, up to rounding, if there are no more processes than pieces.

    Arguments:
        latents: modality to the distinct items' latents, (m_modality, d_modality). They may be memory-mapped. On a GPU they
            are copied to its memory, in bfloat16 if products are. float64 latents are trained on in float64. Latents in half
            precision stay in it, also on a GPU, and each batch is converted to float32.
        rows: modality to n indices into its latents: the training rows, each with at least two items. Negative if missing.
        keys: (n, k) integers: rows that share a non-negative key are related, and never each other's negatives.
        validate: maps adapters in eval mode to metrics; the adapters with the largest `score` are kept.
        preset: the hyperparameters.
        seed: random seed for initialisation, batches, mixup and dropout. On one machine it determines the adapters.
        fixed: modality to an adapter that is not trained: a side's own latents (`FrozenSide`), or a trained bridge's
            adapter that another modality is bound to.
        device: a torch device.
        checkpoint: a file to resume from if it exists, and to write every few seconds. Removed when training ends.
        on_epoch: called after each epoch with its number (from 1) and mean loss.

    If the loss or a weight becomes non-finite, training stops and returns the best adapters so far.

    Raises:
        BridgekitError: that happened before the first validation.

    Source: FuseMix (arXiv 2312.10144), algorithm 1, there for two modalities.
    """
    fixed = fixed or {}
    n, names = len(keys), list(latents)
    batch_size = max(2, min(preset.batch_size, n // preset.min_steps_per_epoch))
    steps = n // batch_size  # an epoch; the incomplete batch at its end is dropped
    on_gpu = torch.device(device).type == "cuda"

    adapters = initial_adapters(latents, rows, preset, seed, fixed)
    for adapter in fixed.values():
        adapter.to(device).eval().requires_grad_(False)
    moving = nn.ModuleDict({name: adapters[name] for name in names if name not in fixed}).to(device)
    weights = list(moving.parameters())
    temperature = nn.Parameter(weights[0].new_tensor(preset.temperature).clamp(*TEMPERATURE_BOUNDS), preset.learn_temperature)
    optimizer = _optimizer(weights, temperature, preset)
    state = TrainingState(moving, temperature, optimizer)
    if checkpoint:
        state.resume(checkpoint)

    products = product_dtype(device)
    index = torch.stack([rows[name] for name in names], 1).to(device)
    forward = [partial(_mix_and_embed, adapters[name]) for name in names]
    run = _Run(
        preset=preset,
        latents=[
            matrix.to(device, products if on_gpu and matrix.dtype != HALF else matrix.dtype) for matrix in latents.values()
        ],
        index=index,
        keys=needed_keys(keys).to(device),
        incomplete=bool((index < 0).any()),
        forward=[torch.compile(each) for each in forward] if on_gpu and preset.epochs * steps >= COMPILE_STEPS else forward,
        products=products,
        # Nothing is learned from two fixed sides.
        compared=[(a, b) for a, b in combinations(range(len(names)), 2) if not {names[a], names[b]} <= set(fixed)],
        temperature=temperature,
        optimizer=optimizer,
        rows_that_fit=activation_room(device) // max(1, activation_bytes([adapters[name] for name in moving])),
    )
    diverged: int | None = None
    # Random numbers are seeded by their place in the run, so that a resumed run, or a process with only some of the pieces,
    # draws the same ones as a single uninterrupted process.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if on_gpu else []), fast_products(device):
        for epoch in range(state.epoch + 1, preset.epochs + 1):
            moving.train()
            losses = []
            seed_here(seed, epoch)
            for step, batch in enumerate(draw_batches(n, batch_size, device)):
                lr = learning_rate(preset, epoch, step, steps)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                losses.append(train_step(run, batch, (seed, epoch, step)))
            loss = float(torch.stack(losses).mean())
            # The loss is from before the last step, in which the weights may have diverged.
            if not (math.isfinite(loss) and state.is_finite()):
                diverged = epoch
                break
            state.epoch = epoch
            on_epoch(epoch, loss)
            if epoch % max(1, preset.epochs // VALIDATIONS) == 0 or epoch == preset.epochs:
                moving.eval()
                with torch.no_grad():
                    figures = broadcast_from_first(dict(validate(adapters)) if rank() == 0 else {})
                state.add({"epoch": epoch, "loss": loss, "temperature": temperature.item(), "lr": lr, **figures})
                if checkpoint and rank() == 0:
                    state.save_when_due(checkpoint)

    if checkpoint and rank() == 0:
        checkpoint.unlink(missing_ok=True)
    if not state.best:
        raise BridgekitError(
            f"training diverged: the loss is not finite in epoch {diverged}" if diverged else "no validation gave a number",
            remedy="look for extreme latents (bridgekit check), or train with --preset default; nothing was written",
        )
    state.restore_best()
    moving.eval().cpu()
    return Trained(adapters, temperature.item(), state.history, round(state.best["epoch"]), diverged)


@dataclass(frozen=True)
class _Run:
    """What every step needs, on the device of the run. Sides are numbered in the order of the latents.

    Arguments:
        preset: the hyperparameters.
        latents: for each side its latents, (m, d).
        index: (n, sides) each row's indices into them, negative if missing.
        keys: (n, k) see `train`.
        incomplete: whether any row lacks an item.
        forward: for each side `_mix_and_embed` with its adapter, compiled if that is worth it.
        products: the number format of matrix products.
        compared: the pairs of sides to compute the loss of.
        temperature, optimizer: as in `TrainingState`.
        rows_that_fit: how many rows' activations fit into memory.
    """

    preset: Preset
    latents: Sequence[Tensor]
    index: Tensor
    keys: Tensor
    incomplete: bool
    forward: Sequence[Callable[..., Tensor]]
    products: torch.dtype
    compared: Sequence[tuple[int, int]]
    temperature: nn.Parameter
    optimizer: torch.optim.Optimizer
    rows_that_fit: int


def draw_batches(n: int, size: int, device: str) -> Sequence[Tensor]:
    """One epoch's batches of row numbers, drawn without replacement; an incomplete last batch is dropped."""
    return torch.split(torch.randperm(n, device=device)[: n // size * size], size)


def learning_rate(preset: Preset, epoch: int, step: int, steps: int) -> float:
    """The learning rate of a step: a cosine from lr to min_lr, set once per epoch, after a linear warm-up from min_lr.

    Warm-up takes `warmup_steps`, but at most a tenth of the run. The release warms up within the
    first epoch only, which is the same if the first epoch is long enough.

    Arguments:
        epoch: from 1.
        step: within the epoch, from 0.
        steps: in an epoch.
    """
    warmup = min(preset.warmup_steps, preset.epochs * steps // 10)
    done = (epoch - 1) * steps + step
    rate = preset.min_lr + (preset.lr - preset.min_lr) * (1 + math.cos(math.pi * (epoch - 1) / preset.epochs)) / 2
    return preset.min_lr + (rate - preset.min_lr) * done / warmup if done < warmup else rate


def train_step(run: _Run, batch: Tensor, place: tuple[int, ...]) -> Tensor:
    """Mix a batch, embed it, compare the sides, and take one step of the optimizer.

    Arguments:
        batch: (b,) numbers of rows.
        place: seeds the step's random numbers.

    Returns:
        the loss before the step, a scalar.
    """
    seed_here(*place)
    first = second = batch
    if run.preset.alpha > 0:
        pattern = ((run.index[batch] >= 0) * 2 ** torch.arange(len(run.latents), device=batch.device)).sum(1)
        first, second = (batch[chosen] for chosen in draw_partners(pattern, run.preset.pairing))
    lam = draw_lambda(len(first), run.preset.alpha, run.preset.lambda_per, batch.device).expand(len(first), 1)
    pieces = cut(len(first), run.rows_that_fit)

    def embed(number: int) -> list[Tensor]:
        seed_here(*place, number)
        piece = pieces.rows[number]
        return _embed(run, first[piece], second[piece], lam[piece])

    def loss_of(embedded: Sequence[Tensor]) -> Tensor:
        return _loss(run, first, second, pieces.bounds, embedded)

    run.optimizer.zero_grad(set_to_none=True)
    loss = backward_in_pieces(embed, pieces.own, loss_of, keep=len(first) <= run.rows_that_fit)
    sum_gradients([parameter for group in run.optimizer.param_groups for parameter in group["params"]])
    run.optimizer.step()
    with torch.no_grad():
        # The release clamps before each step. Clamping after it as well as at the start is the same, and keeps what is saved
        # within the bounds.
        run.temperature.clamp_(*TEMPERATURE_BOUNDS)
    return loss


def _embed(run: _Run, first: Tensor, second: Tensor, lam: Tensor) -> list[Tensor]:
    """For each side the embeddings, at unit length, of the mixed rows that have it.

    Arguments:
        first, second: (m,) numbers of the rows that are mixed.
        lam: (m, 1).
    """
    embedded = []
    for side, (latents, forward) in enumerate(zip(run.latents, run.forward, strict=True)):
        one, other, share = run.index[first, side], run.index[second, side], lam
        if run.incomplete:
            there = one >= 0
            one, other, share = one[there], other[there], share[there]
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=run.products == torch.bfloat16):
            embedded.append(forward(latents, one, other, share))
    return embedded


def _mix_and_embed(adapter: Adapter, latents: Tensor, one: Tensor, other: Tensor, lam: Tensor) -> Tensor:
    """Mix latents and embed them: embeddings of unit length in float32 (float64 for float64)."""
    embedded = adapter(fusemix(widened(latents[one]), widened(latents[other]), lam))
    return nn.functional.normalize(embedded.to(torch.promote_types(embedded.dtype, torch.float32)), dim=-1)


def _loss(run: _Run, first: Tensor, second: Tensor, bounds: Sequence[tuple[int, int]], embedded: Sequence[Tensor]) -> Tensor:
    """The mean over pairs of sides of the InfoNCE of the mixed rows that have both.

    Arguments:
        first, second: (m,) numbers of the mixed rows. A mixed row is related to whatever either of its rows is.
        bounds: for each process the number of its first mixed row and the one after its last.
        embedded: for each side the embeddings of this process's rows that have it, in order.
    """
    keys = torch.stack([run.keys[first], run.keys[second]], -1)
    there = run.index[first] >= 0
    own = there[slice(*bounds[rank()])]
    losses = []
    for a, b in run.compared:
        x, y, related, counts = embedded[a], embedded[b], keys, [stop - start for start, stop in bounds]
        if run.incomplete:
            both = there[:, a] & there[:, b]
            if not both.any():
                continue
            x, y = x[own[own[:, a], b]], y[own[own[:, b], a]]
            related, counts = keys[both], [int(both[start:stop].sum()) for start, stop in bounds]
        shares = Shares(counts, rank()) if len(bounds) > 1 else None
        losses.append(info_nce(x, y, 1 / run.temperature, related, shares=shares))
    return torch.stack(losses or [0 * side.sum() for side in embedded]).mean()


def _optimizer(weights: Sequence[nn.Parameter], temperature: nn.Parameter, preset: Preset) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only, not on biases, norms or the temperature."""
    matrices = [weight for weight in weights if weight.ndim > 1]
    others = [weight for weight in weights if weight.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": preset.weight_decay},
        {"params": [*others, *([temperature] if temperature.requires_grad else [])], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=preset.lr, fused=True)
