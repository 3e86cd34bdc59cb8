"""Trains the fusion adapters on latents: FuseMix, symmetric InfoNCE, AdamW, warm-up and cosine, early stopping, checkpoints."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bridgekit.errors import BridgekitError
from bridgekit.fusion.adapter import Adapter, FusionAdapter
from bridgekit.fusion.contrastive import info_nce, needed_keys
from bridgekit.fusion.distributed import Shares, rank, sum_gradients, told_by_first
from bridgekit.fusion.fusemix import LambdaPer, Pairing, draw_lambda, draw_partners, fusemix
from bridgekit.fusion.pieces import activation_bytes, activation_room, backward_in_pieces, cut, seed_here
from bridgekit.fusion.warm_start import spread_rows, warm_start
from bridgekit.hardware import fast_products, product_dtype
from bridgekit.progress import say
from bridgekit.storage.bounded import parse_json
from bridgekit.storage.sealed import DamagedFile, read_sealed, write_sealed

#: A run that is killed loses at most this many seconds of training.
CHECKPOINT_SECONDS = 10.0
#: On a GPU, adapters are compiled for runs of at least this many steps: compiling takes about a minute.
COMPILE_STEPS = 2_000
#: The temperature may move between these (FuseMix's released bounds).
TEMPERATURE_BOUNDS = (0.001, 0.5)


@dataclass(frozen=True)
class Preset:
    """Hyperparameters of one way to train.

    Arguments:
        shared_dim: width of the shared space. A frozen side sets it instead.
        blocks, expansion, dropout, input_dropout: as in `FusionAdapter`.
        alpha, alpha_end: lambda ~ Beta(alpha, alpha); alpha moves linearly to alpha_end over the epochs. 0 turns mixup off.
        pairing: `halves` or `permutation`, see `draw_partners`.
        lambda_per: one lambda per `batch` or per `pair`.
        batch_size: rows drawn per step, before halves are mixed.
        min_steps_per_epoch: a small table is cut into at least this many batches.
        epochs: passes over the training rows.
        lr, min_lr, warmup_steps: linear from min_lr to lr, then cosine back to min_lr.
        weight_decay: AdamW's, not on biases and norms.
        temperature: where the learnable temperature starts.
        patience: stop after this many of the 50 validations without a better one; 0 never stops early.
        keep_best: end with the adapters of the best validation; otherwise with the last epoch's.
        standardise: standardise latents by the training rows' mean and standard deviation.
        warm_start: start from the linear solution with this much regularisation (see `warm_start`); 0 starts at random.
    """

    shared_dim: int = 512
    blocks: int = 4
    expansion: float = 4.0
    dropout: float = 0.6
    input_dropout: float = 0.0
    alpha: float = 1.0
    alpha_end: float = 1.0
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
    patience: int = 0
    keep_best: bool = True
    standardise: bool = False
    warm_start: float = 0.0


#: `paper` is FuseMix's released configuration. `default` is for a few thousand pairs; benchmarks/RESULTS.md shows its choice.
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
        standardise=True,
        warm_start=0.5,
    ),
    "paper": Preset(),
}


@dataclass(frozen=True)
class Trained:
    """What training gave.

    Arguments:
        adapters: modality to its adapter, in eval mode, on the CPU. Fixed ones are those that were given.
        temperature: the learned temperature of the best epoch.
        history: one record per validation: epoch, loss, temperature, lr, and what `validate` returned.
        best_epoch: the epoch whose adapters these are.
        diverged: the epoch in which loss or weights were no longer finite and training ended, or None.
    """

    adapters: dict[str, Adapter]
    temperature: float
    history: list[dict[str, float]]
    best_epoch: int
    diverged: int | None = None


def new_adapters(
    dims: Mapping[str, int], preset: Preset, seed: int, fixed: Mapping[str, Adapter] | None = None
) -> dict[str, Adapter]:
    """Untrained adapters, one per modality, beside the fixed ones, which set the shared width."""
    fixed = fixed or {}
    shared_dim = next((adapter.shared_dim for adapter in fixed.values()), preset.shared_dim)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {
            name: fixed[name]
            if name in fixed
            else FusionAdapter(dim, shared_dim, preset.blocks, preset.expansion, preset.dropout, preset.input_dropout)
            for name, dim in dims.items()
        }


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
    """Train fusion adapters so that the latents of two or more modalities meet in one space.

    Every row is mixed with another that has the same modalities, by one lambda for all of them. The loss is the symmetric
    InfoNCE of each pair of modalities over the mixed rows that have both, averaged over the pairs of modalities. (Weighting
    them by their rows instead gave less: where 12,000 rows have speech and text and 1,500 text and a picture, recall@1 from
    speech to pictures was 60 against 66 %, and from pictures to text no better.)

    A batch goes through the adapters in pieces, each with random numbers of its own. Where its activations would take more than
    `activation_room`, only the embeddings are kept, and each piece is embedded again when the loss's gradients for them are
    known: memory then does not grow with the batch. Where `torchrun` started several processes, each embeds some of the
    pieces, and the adapters are those of one process, up to rounding, as long as there are no more processes than pieces.

    Arguments:
        latents: modality to the distinct items' latents, (m_modality, d_modality). They may be memory-mapped. On a GPU they
            lie in its memory, in bfloat16 where products run in it.
        rows: modality to n indices into its latents: the training rows, each with two items at least. Negative for a hole.
        keys: (n, k) integers: rows that share one that is not negative belong together and are never each other's negatives.
        validate: from adapters in eval mode to figures; `score` among them is the one that early stopping maximises.
        preset: the hyperparameters.
        seed: of initialisation, batches, mixup and dropout. The same seed on the same machine gives the same adapters.
        fixed: modality to an adapter that stays as it is: a side's own latents (`FrozenSide`), or a trained bridge's
            adapter where a further modality is bound to it.
        device: a torch device.
        checkpoint: a file to go on from if it is there, and to write every few seconds. Removed when training ends.
        on_epoch: called after each epoch with its number (from 1) and mean loss.

    Where loss or weights are no longer finite, training ends with what the validations before have found best.

    Raises:
        BridgekitError: that happened before the first validation.

    Source: FuseMix (arXiv 2312.10144), algorithm 1, there for two modalities.
    """
    fixed = fixed or {}
    n = len(keys)
    adapters = new_adapters({name: matrix.shape[1] for name, matrix in latents.items()}, preset, seed, fixed)
    moving = nn.ModuleDict({name: adapter for name, adapter in adapters.items() if name not in fixed})
    some_latents, some_rows = spread_rows(latents, rows) if preset.standardise or preset.warm_start else (latents, rows)
    if preset.standardise:
        for name, adapter in moving.items():
            assert isinstance(adapter, FusionAdapter)
            adapter.standardise(some_latents[name][some_rows[name][some_rows[name] >= 0]])
    if preset.warm_start:
        warm_start(adapters, some_latents, some_rows, preset.warm_start, fixed)
    for adapter in adapters.values():
        adapter.to(device)
    for adapter in fixed.values():
        adapter.eval().requires_grad_(False)
    keys = needed_keys(keys).to(device)
    log_scale = nn.Parameter(torch.tensor(math.log(1 / preset.temperature), device=device))
    parameters = [*moving.parameters(), log_scale]
    optimizer = _optimizer(moving, log_scale, preset)
    batch_size = max(2, min(preset.batch_size, n // preset.min_steps_per_epoch))
    steps_per_epoch = n // batch_size
    total_steps = preset.epochs * steps_per_epoch
    validate_every = max(1, preset.epochs // 50)
    sides = _Sides.on(device, latents, rows, adapters, compiled=total_steps >= COMPILE_STEPS)
    # Two fixed sides have nothing to learn from each other.
    names = list(latents)
    joined = [(a, b) for a, b in combinations(range(len(names)), 2) if not {names[a], names[b]} <= set(fixed)]
    row_bytes, room = activation_bytes([adapters[name] for name in moving]), activation_room(device)

    diverged: int | None = None
    state = _State(moving, log_scale, optimizer, preset.keep_best)
    if checkpoint:
        state.go_on_from(checkpoint)
    saved = time.monotonic()

    on_gpu = torch.device(device).type == "cuda"
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if on_gpu else []), fast_products(device):
        for epoch in range(state.epoch + 1, preset.epochs + 1):
            if preset.patience and len(state.history) - state.best_index >= preset.patience:
                break
            # All that is drawn is drawn from a seed of its own place: a run that goes on from a checkpoint, and a process that
            # has only some of the pieces, draw what one undisturbed process draws.
            seed_here(seed, epoch)
            progress = (epoch - 1) / max(1, preset.epochs - 1)
            alpha = preset.alpha + (preset.alpha_end - preset.alpha) * progress
            order = torch.randperm(n, device=device)
            losses: list[Tensor] = []
            moving.train()
            for batch in torch.split(order[: steps_per_epoch * batch_size], batch_size):
                step = (epoch - 1) * steps_per_epoch + len(losses)
                lr = learning_rate(step, total_steps, preset)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                seed_here(seed, epoch, step)
                first, second = draw_partners(sides.pattern[batch], preset.pairing)
                first, second = batch[first], batch[second]
                lam = draw_lambda(len(first), alpha, preset.lambda_per, batch.device).expand(len(first), 1)
                related = _mixed_keys(keys, first, second, preset.alpha > 0)
                pieces = cut(len(first), room // max(1, row_bytes))
                embed = [
                    partial(
                        sides.embed, (seed, epoch, step, number), *(each[pieces.rows[number]] for each in (first, second, lam))
                    )
                    for number in pieces.own
                ]
                loss_of = partial(_loss_over_pairs, joined, sides.there(first), pieces.bounds, log_scale, related)
                optimizer.zero_grad(set_to_none=True)
                losses.append(backward_in_pieces(embed, loss_of, keep=row_bytes * len(first) <= room))
                sum_gradients(parameters)
                optimizer.step()
                with torch.no_grad():
                    log_scale.clamp_(*(math.log(1 / bound) for bound in reversed(TEMPERATURE_BOUNDS)))
            mean_loss = float(torch.stack(losses).mean())
            # A finite loss says nothing of the last step: weights may have run off in it, and would be judged next.
            if not (math.isfinite(mean_loss) and state.is_finite()):
                diverged = epoch
                break
            state.epoch = epoch
            on_epoch(epoch, mean_loss)
            if epoch % validate_every == 0 or epoch == preset.epochs:
                moving.eval()
                with torch.no_grad():
                    figures = told_by_first(dict(validate(adapters)) if rank() == 0 else {})
                state.judge(
                    {"epoch": epoch, "loss": mean_loss, "temperature": math.exp(-log_scale.item()), "lr": lr, **figures}
                )
                if checkpoint and rank() == 0 and time.monotonic() - saved > CHECKPOINT_SECONDS:
                    state.keep(checkpoint)
                    saved = time.monotonic()

    if checkpoint and rank() == 0:
        checkpoint.unlink(missing_ok=True)
    if not state.best_index:
        raise BridgekitError(
            f"training diverged: the loss is not finite in epoch {diverged}" if diverged else "no validation gave a number",
            remedy="look for extreme latents (bridgekit check), or train with --preset default; nothing was written",
        )
    temperature = state.restore_best()
    moving.eval().cpu()
    best_epoch = round(state.history[state.best_index - 1]["epoch"])
    return Trained(adapters, temperature, state.history, best_epoch, diverged)


@dataclass(frozen=True)
class _Sides:
    """The latents of all sides, where training runs, and how rows of them become embeddings.

    Arguments:
        data: for each side its latents, (m, d): one block, so that a batch is one gather.
        index: (n, sides) each row's place in them, negative for a hole.
        pattern: (n,) a number for which sides a row has.
        forward: for each side what mixes and embeds, compiled where that is worth it.
        dtype: of products.
    """

    data: Sequence[Tensor]
    index: Tensor
    pattern: Tensor
    forward: Sequence[Callable[..., Tensor]]
    dtype: torch.dtype

    @classmethod
    def on(
        cls,
        device: str,
        latents: Mapping[str, Tensor],
        rows: Mapping[str, Tensor],
        adapters: Mapping[str, Adapter],
        compiled: bool,
    ) -> _Sides:
        """Bring latents to a device."""
        dtype, on_gpu = product_dtype(device), torch.device(device).type == "cuda"
        data = [matrix.to(device, dtype if on_gpu else matrix.dtype) for matrix in latents.values()]
        index = torch.stack([rows[name] for name in latents], 1).to(device)
        pattern = ((index >= 0) * 2 ** torch.arange(len(data), device=index.device)).sum(1)
        plain = [partial(_mix_and_embed, adapters[name]) for name in latents]
        forward = [torch.compile(each) for each in plain] if on_gpu and compiled else plain
        return cls(data, index, pattern, forward, dtype)

    def there(self, rows: Tensor) -> list[Tensor] | None:
        """For each side whether rows have it, (m,); None where the whole table has no holes."""
        return list((self.index[rows] >= 0).unbind(1)) if self.holes else None

    @cached_property
    def holes(self) -> bool:
        """Whether some row lacks a side."""
        return bool((self.index < 0).any())

    def embed(self, place: tuple[int, ...], first: Tensor, second: Tensor, lam: Tensor) -> list[Tensor]:
        """For each side the embeddings, at unit length, of those mixed rows that have it.

        Arguments:
            place: what dropout is seeded by.
            first, second: (m,) the rows that are mixed.
            lam: (m, 1).
        """
        seed_here(*place)
        embedded = []
        for side, (data, forward) in enumerate(zip(self.data, self.forward, strict=True)):
            one, other, share = self.index[first, side], self.index[second, side], lam
            if self.holes:
                here = one >= 0
                one, other, share = one[here], other[here], share[here]
            with torch.autocast(data.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                embedded.append(forward(data, one, other, share))
        return embedded


def _mix_and_embed(adapter: Adapter, data: Tensor, one: Tensor, other: Tensor, lam: Tensor) -> Tensor:
    """Rows of latents mixed with others, as embeddings of unit length in float32."""
    return nn.functional.normalize(adapter(fusemix(data[one], data[other], lam)).float(), dim=-1)


def _loss_over_pairs(
    joined: Sequence[tuple[int, int]],
    there: Sequence[Tensor] | None,
    bounds: Sequence[tuple[int, int]],
    log_scale: Tensor,
    keys: Tensor,
    embedded: Sequence[Tensor],
) -> Tensor:
    """The mean over pairs of sides of the InfoNCE of the mixed rows that have both.

    Arguments:
        joined: the pairs of sides to count.
        there: for each side (m,) whether a row has it; None where all have all.
        bounds: for each process its rows.
        log_scale: the logarithm of 1 / temperature.
        keys: (m, k, r), see `info_nce`.
        embedded: for each side the embeddings of those of this process's rows that have it, in their order.
    """
    mine = slice(*bounds[rank()])
    losses = []
    for a, b in joined:
        x, y, related, counts = embedded[a], embedded[b], keys, [stop - start for start, stop in bounds]
        if there is not None:
            both = there[a] & there[b]
            if not both.any():
                continue
            x, y = (each[both[mine][there[side][mine]]] for each, side in ((x, a), (y, b)))
            related, counts = keys[both], [int(both[start:stop].sum()) for start, stop in bounds]
        losses.append(info_nce(x, y, log_scale.exp(), related, shares=Shares(counts, rank()) if len(bounds) > 1 else None))
    return torch.stack(losses).mean() if losses else log_scale * 0


def learning_rate(step: int, total_steps: int, preset: Preset) -> float:
    """Linear warm-up, then cosine. Warm-up takes at most a tenth of a short run."""
    warmup = min(preset.warmup_steps, total_steps // 10)
    if step < warmup:
        return preset.min_lr + (preset.lr - preset.min_lr) * step / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return preset.min_lr + (preset.lr - preset.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def _mixed_keys(keys: Tensor, first: Tensor, second: Tensor, mixed: bool) -> Tensor:
    """(m, k, 2) keys of mixed pairs, (m, k, 1) of plain ones: a mixed pair is related to whatever either of its parts is."""
    return torch.stack([keys[first], keys[second]], -1) if mixed else keys[first, :, None]


def _optimizer(model: nn.Module, log_scale: nn.Parameter, preset: Preset) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": preset.weight_decay},
        {"params": [*others, log_scale], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=preset.lr, fused=True)


class _State:
    """Where a run stands: its weights, its optimizer, its history and the best weights so far. Saved without pickle."""

    def __init__(self, model: nn.Module, log_scale: nn.Parameter, optimizer: torch.optim.Optimizer, keep_best: bool) -> None:
        self.keep_best = keep_best
        self.model, self.log_scale, self.optimizer = model, log_scale, optimizer
        self.epoch = 0
        self.history: list[dict[str, float]] = []
        self.best_index = 0  # how many validations there were when the best one came
        self.best: dict[str, Tensor] = {}
        self.told = False  # that no checkpoint can be written

    def _now(self) -> dict[str, Tensor]:
        return {**self.model.state_dict(), "log_scale": self.log_scale.data}

    def is_finite(self, *, with_optimizer: bool = False) -> bool:
        """Whether all weights are numbers and, if asked for, all that the optimizer remembers of their gradients."""
        remembered = [value for values in self.optimizer.state.values() for value in values.values()] if with_optimizer else []
        return all(bool(tensor.isfinite().all()) for tensor in (*self._now().values(), *remembered))

    def judge(self, record: dict[str, float]) -> None:
        """Take a validation into the history and keep the weights if it is the best so far."""
        self.history.append(record)
        if not math.isfinite(record["score"]):
            return
        if not self.keep_best or not self.best_index or record["score"] > self.history[self.best_index - 1]["score"]:
            self.best_index = len(self.history)
            self.best = {name: tensor.detach().clone() for name, tensor in self._now().items()}

    def restore_best(self) -> float:
        """Put the best weights back into the model; returns their temperature."""
        self._restore(self.best)
        return math.exp(-self.log_scale.item())

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.model.load_state_dict({name: tensor for name, tensor in tensors.items() if name != "log_scale"})
        self.log_scale.data.copy_(tensors["log_scale"])

    def keep(self, path: Path) -> None:
        """`save`, as far as it can be: a run that nobody stops needs no checkpoint."""
        try:
            self.save(path)
        except BridgekitError as error:
            if not self.told:
                say(f"the run goes on without a checkpoint ({error.what}: {path.parent})")
            self.told = True

    def save(self, path: Path) -> None:
        """Write everything that an undisturbed run would still have in memory; nothing where some of that is not finite."""
        if not self.is_finite(with_optimizer=True):
            return
        tensors = {f"now/{name}": tensor for name, tensor in self._now().items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        for number, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{number}/{name}": tensor for name, tensor in values.items()}
        story = {"epoch": self.epoch, "best_index": self.best_index, "history": self.history}
        write_sealed(path, tensors, {"state": json.dumps(story)})

    def go_on_from(self, path: Path) -> None:
        """`load` a checkpoint, if there is one that can be used."""
        try:
            self.load(path)
        except FileNotFoundError:
            return
        except (DamagedFile, OSError, ValueError, KeyError, TypeError) as error:
            say(f"training starts afresh, for its checkpoint cannot be used ({error}: {path})")

    def load(self, path: Path) -> None:
        """The inverse of `save`. What does not fit changes nothing.

        Raises:
            DamagedFile: it is not what was written, or is of another run.
        """
        tensors, told = read_sealed(path)
        story: dict[str, Any] = parse_json(told["state"], lenient=True)
        parts: dict[str, dict[str, Tensor]] = {"now": {}, "best": {}, "optimizer": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor.to(self.log_scale.device)
        epoch, best_index, history = int(story["epoch"]), int(story["best_index"]), list(story["history"])
        shapes = {name: tensor.shape for name, tensor in self._now().items()}
        if any({name: tensor.shape for name, tensor in parts[part].items()} != shapes for part in ("now", "best")):
            raise DamagedFile("it is of another run")
        whole = self.optimizer.state_dict()
        for key, tensor in parts["optimizer"].items():
            number, _, name = key.partition("/")
            whole["state"].setdefault(int(number), {})[name] = tensor
        self.optimizer.load_state_dict(whole)
        self._restore(parts["now"])
        self.best = parts["best"]
        self.epoch, self.best_index, self.history = epoch, best_index, history
