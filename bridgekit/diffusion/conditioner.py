"""The conditioner: a map from a bridge's shared space to a text-to-image model's conditioning, fitted on captions alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cosine_similarity, normalize

from bridgekit.bridge.bridge import Bridge
from bridgekit.encoders import TEXT, Item
from bridgekit.errors import BridgekitError, one_line
from bridgekit.image_models import Conditioning
from bridgekit.latents.encode import encode_items
from bridgekit.progress import Report, say, silent
from bridgekit.retrieval import Hit, nearest
from bridgekit.storage.bounded import parse_json
from bridgekit.storage.sealed import read_sealed, write_sealed

FORMAT = 2
MAX_METADATA, MAX_ITEMS = 1 << 20, 256 << 20  # bytes of a file's metadata, and of the items it was fitted on
MAX_PARTS, MAX_SIDE = 16, 1 << 16  # tensors of a model's conditioning, and length of a dimension
#: A conditioner is fitted again if the model's encoding of the probes has a lower cosine to the stored one: other weights.
SAME_WEIGHTS = 0.999
#: Texts whose encoding by the model is stored with each conditioner.
PROBES = ("a red apple", "a dog barks in the rain")
#: Width of the network's hidden layers, and tokens that the queries of a sequence attend to.
WIDTH, TOKENS = 512, 8
#: Factor on the logits of the contrastive softmax: its temperature was learned on mixed pairs, so it is too high for real ones.
SHARPNESS = 3.0
#: Methods for moving embeddings of other modalities to the region of the captions' embeddings.
GAPS = ("captions", "mean", "none")


@dataclass(frozen=True)
class Fit:
    """Hyperparameters of fitting a conditioner.

    Arguments:
        steps: optimizer steps.
        batch_size: captions per step.
        lr: peak learning rate of AdamW, with cosine decay to zero.
        noise: maximum norm of the noise added to unit embeddings, since other modalities' embeddings are only close.
        captions: maximum number of captions; a random sample of more.
        seed: random seed.
    """

    steps: int = 1_500
    batch_size: int = 128
    lr: float = 3e-3
    noise: float = 0.25
    captions: int = 4_096
    seed: int = 0


class ConditionerNet(nn.Module):
    """Maps an embedding to all tensors of a model's conditioning.

    A vector (a pooled text embedding, a CLIP image embedding) is predicted by a linear map plus an MLP. A sequence (prompt
    embeddings) is predicted by one learned query per position, attending to a few tokens computed from the embedding. A mask
    is predicted as logits, by a linear map.

    Arguments:
        dim: width of the shared space.
        shapes: name to shape without the batch: (d,) for a vector, (L, d) for a sequence, (L,) for a mask.
        masks: which names are masks.
    """

    def __init__(self, dim: int, shapes: Mapping[str, tuple[int, ...]], masks: Sequence[str]) -> None:
        super().__init__()
        self.shapes, self.masks = dict(shapes), tuple(masks)
        self.parts = nn.ModuleDict()
        for name, shape in self.shapes.items():
            kind: type[nn.Module] = nn.Linear if name in self.masks else _Vector if len(shape) == 1 else _Sequence
            self.parts[name] = kind(dim, *shape)

    def forward(self, embeddings: Tensor) -> dict[str, Tensor]:
        """(n, dim) unit vectors to name -> (n, ...), standardised; masks as logits."""
        scaled = embeddings * embeddings.shape[1] ** 0.5  # unit variance, as the initialisation expects
        return {name: part(scaled) for name, part in self.parts.items()}


class _Vector(nn.Module):
    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, out))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x) + self.mlp(x)
        return out


class _Sequence(nn.Module):
    def __init__(self, dim: int, length: int, out: int) -> None:
        super().__init__()
        self.tokens = nn.Sequential(nn.Linear(dim, TOKENS * WIDTH), nn.Unflatten(1, (TOKENS, WIDTH)), nn.LayerNorm(WIDTH))
        self.queries = nn.Parameter(torch.randn(length, WIDTH))
        layer = nn.TransformerDecoderLayer(WIDTH, 8, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2, nn.LayerNorm(WIDTH))
        self.out = nn.Linear(WIDTH, out)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries.expand(len(x), -1, -1)
        out: Tensor = self.out(self.decoder(queries, self.tokens(x)))
        return out


@dataclass(frozen=True)
class Conditioner:
    """Maps embeddings of a bridge's shared space to a model's conditioning.

    Arguments:
        kind: the kind of conditioning, for example `prompt_embeds`.
        made_of: the modality of the items it was fitted on.
        items: those items: captions, or paths of images.
        embeddings: (n, dim) their embeddings in the shared space, of unit length.
        net: the map; None if the shared space already is the conditioning.
        scale: without a map, the typical norm of the conditioning's vectors.
        mean, std: name to the mean and deviation that targets were standardised with, per position for sequences.
        probe: the model's own encoding of `PROBES` at the time of fitting.
        cosine: quality of fit: mean cosine between predicted and true conditioning vectors.
        adapter: `Bridge.weights_hash` of that modality; the conditioner is only valid for this adapter.
    """

    kind: str
    made_of: str
    items: Sequence[str]
    embeddings: Tensor = field(repr=False)
    net: ConditionerNet | None = field(repr=False, default=None)
    scale: float = 1.0
    mean: Mapping[str, Tensor] = field(repr=False, default_factory=dict)
    std: Mapping[str, Tensor] = field(repr=False, default_factory=dict)
    probe: Mapping[str, Tensor] = field(repr=False, default_factory=dict)
    cosine: float = 1.0
    adapter: str = ""

    @torch.inference_mode()
    def __call__(self, embeddings: Tensor) -> dict[str, Tensor]:
        """(n, dim) unit vectors to tensors for `Conditioning.arguments`: float32, masks bool, on the CPU."""
        if self.net is None:
            return {self.kind: embeddings * self.scale}
        made = self.net(embeddings)
        return {
            name: tensor > 0 if name in self.net.masks else tensor * self.std[name] + self.mean[name]
            for name, tensor in made.items()
        }

    def nearest(self, embeddings: Tensor, k: int = 3) -> list[list[Hit]]:
        """For each of n embeddings the k items that it is nearest to."""
        return nearest(embeddings, self.embeddings, self.items, k)


def close_gap(bridge: Bridge, conditioner: Conditioner, modality: str, embeddings: Tensor, gap: str) -> Tensor:
    """Close the modality gap: move embeddings to the region the conditioner was fitted on.

    Contrastive training leaves each modality in its own region (Liang et al., "Mind the gap", NeurIPS 2022), so the embedding
    of a clip differs systematically from that of its caption.

    Arguments:
        bridge, conditioner: the bridge that produced them, and a conditioner fitted for it.
        modality: the embeddings' modality. If it is the conditioner's own, they are returned unchanged.
        embeddings: (n, dim) of unit length.
        gap: `none` does nothing. `mean` shifts them by the difference between the two modalities' means. `captions` replaces
            each by the mean of the captions' embeddings, weighted by the bridge's softmax over similarities: the expected
            caption under the contrastive model (cf. the memory projection of DeCap, Li et al., ICLR 2023).

    Returns:
        (n, dim) of unit length.
    """
    if modality == conditioner.made_of or gap == "none":
        return embeddings
    if gap == "mean":
        if not {modality, conditioner.made_of} <= set(bridge.means):
            return embeddings
        return normalize(embeddings - bridge.means[modality] + bridge.means[conditioner.made_of], dim=-1)
    return bridge.expected(embeddings, conditioner.embeddings, SHARPNESS)


def fit_conditioner(
    bridge: Bridge, conditioning: Conditioning, items: Sequence[Item], *, fit: Fit = Fit(), report: Report = silent
) -> Conditioner:
    """Fit the map from a bridge's space to a model's conditioning.

    Arguments:
        bridge: a bridge with a side for the modality that the conditioning is made of.
        items: captions, or images if the conditioning is made of images. No audio is needed.

    Raises:
        BridgekitError: an item cannot be encoded by the bridge, or the model cannot encode them.
    """
    generator = torch.Generator().manual_seed(fit.seed)
    if len(items) > fit.captions:
        items = [items[row] for row in torch.randperm(len(items), generator=generator)[: fit.captions].sort().values.tolist()]
    embeddings = bridge.embed(conditioning.made_of, items, report=report)
    report("the model's own encoding", 0, 1)
    targets = _own_encoding(conditioning, items)
    report("the model's own encoding", 1, 1)
    masks = [name for name, tensor in targets.items() if tensor.dtype == torch.bool]
    mean = {name: tensor.mean(0) for name, tensor in targets.items() if name not in masks}
    std = {name: _spread(targets[name] - mean[name]) for name in mean}
    counts = {name: (spread.square() / spread.square().mean()).squeeze(-1) for name, spread in std.items()}
    weights = {name: _weight(targets[name], [targets[mask] for mask in masks]) for name in mean}

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fit.seed)
        net = ConditionerNet(bridge.dim, {name: tuple(tensor.shape[1:]) for name, tensor in targets.items()}, masks)
        net.to(bridge.device)
        optimizer = torch.optim.AdamW(net.parameters(), lr=fit.lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, fit.lr, total_steps=fit.steps, pct_start=0.05)
        for step in range(fit.steps):
            rows = torch.randint(len(items), (fit.batch_size,))
            noise = torch.randn(fit.batch_size, bridge.dim) * torch.rand(fit.batch_size, 1) * fit.noise / bridge.dim**0.5
            made = net(normalize(embeddings[rows] + noise, dim=-1).to(bridge.device))
            loss = torch.zeros((), device=bridge.device)
            for name, tensor in made.items():
                # Targets stay on the CPU: thousands of long sequences may not fit in GPU memory.
                target = targets[name][rows]
                if name in masks:
                    loss = loss + binary_cross_entropy_with_logits(tensor, target.float().to(bridge.device))
                    continue
                error = (tensor - ((target - mean[name]) / std[name]).to(bridge.device)).square().mean(-1)
                weight = (weights[name][rows] * counts[name]).to(bridge.device)
                loss = loss + (error * weight).sum() / weight.sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            report("fitting conditioner", step + 1, fit.steps)
    net.cpu().eval().requires_grad_(False)
    fitted = Conditioner(
        conditioning.kind,
        conditioning.made_of,
        [str(item) for item in items],
        embeddings,
        net,
        mean=mean,
        std=std,
        probe=probe(conditioning),
        adapter=bridge.weights_hash([conditioning.made_of]),
    )
    return replace(fitted, cosine=_cosine(fitted, targets, weights))


def _own_encoding(conditioning: Conditioning, items: Sequence[Any]) -> dict[str, Tensor]:
    """The model's own encoding. A model with missing parts may load without an error and fail only here."""
    try:
        return conditioning.encode(items)
    except BridgekitError:
        raise
    except Exception as error:  # diffusers and transformers may raise anything
        raise BridgekitError(
            f"the model cannot encode {conditioning.made_of}: {type(error).__name__}: {one_line(error)}",
            remedy="check that its folder is complete: tokenizer, text encoder, image encoder",
        ) from error


def direct_conditioner(bridge: Bridge, conditioning: Conditioning, modality: str, items: Sequence[Item]) -> Conditioner:
    """The conditioner for a frozen side whose latents the conditioning takes directly. Only the vectors' norm is fitted.

    `close_gap` uses the items, which are of that modality, as captions.
    """
    latents = encode_items(bridge.encoder(modality), items)
    rows = latents.matrix[torch.from_numpy(latents.ids[latents.ids >= 0])]
    kept = [str(item) for position, item in enumerate(items) if position not in latents.failed]
    scale, adapter = float(rows.norm(dim=-1).mean()), bridge.weights_hash([modality])
    return Conditioner(conditioning.kind, modality, kept, bridge.project(modality, rows), None, scale, adapter=adapter)


def _spread(centred: Tensor) -> Tensor:
    """The standard deviation of centred (n, d) targets, or per position, (L, 1), of (n, L, d) ones.

    Most positions of a long sequence barely change between short captions. Standardising each position lets the network fit
    the few that do; the loss then weights positions by their variance, as without scaling.
    """
    if centred.ndim < 3:
        return centred.std().clamp_min(1e-6)
    spread = centred.square().mean((0, 2)).sqrt()[:, None]
    return spread.clamp_min(max(1e-6, 1e-3 * float(spread.max())))


def _weight(target: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Loss weight of each of a target's vectors, (n,) or (n, L): 0 for masked ones, which the model never reads."""
    fitting = (mask.float() for mask in masks if mask.shape == target.shape[:-1])
    return next(fitting, torch.ones(target.shape[:-1]))


def _cosine(conditioner: Conditioner, targets: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> float:
    """The mean cosine over all unmasked vectors of all targets."""
    total, count = 0.0, 0.0
    for start in range(0, len(conditioner.items), 64):
        made = conditioner(conditioner.embeddings[start : start + 64])
        for name, weight in weights.items():
            part = weight[start : start + 64]
            total += float((cosine_similarity(made[name], targets[name][start : start + 64], dim=-1) * part).sum())
            count += float(part.sum())
    return total / max(count, 1.0)


def probe(conditioning: Conditioning) -> dict[str, Tensor]:
    """The model's own encoding of two fixed texts or images, one vector each, as a fingerprint of its weights."""
    gradients = [PIL.Image.linear_gradient("L").convert("RGB"), PIL.Image.radial_gradient("L").convert("RGB")]
    encoded = _own_encoding(conditioning, PROBES if conditioning.made_of == TEXT else gradients)
    return {
        name: (tensor.mean(1) if tensor.ndim == 3 else tensor) for name, tensor in encoded.items() if tensor.dtype != torch.bool
    }


def same_weights(conditioner: Conditioner, conditioning: Conditioning) -> bool:
    """Whether the model still encodes the probes as when the conditioner was fitted.

    With a tolerance, since half precision and other machines round differently.
    """
    if conditioner.kind != conditioning.kind or conditioner.net is None:
        return conditioner.kind == conditioning.kind
    now, then = probe(conditioning), conditioner.probe
    return now.keys() == then.keys() and all(
        now[name].shape == then[name].shape and bool((cosine_similarity(now[name], then[name], dim=-1) > SAME_WEIGHTS).all())
        for name in then
    )


# ---- on disk


def save_conditioner(conditioner: Conditioner, path: Path) -> None:
    """Write a conditioner as one safetensors file with a checksum, atomically."""
    items = json.dumps(list(conditioner.items)).encode()
    tensors = {"embeddings": conditioner.embeddings, "items": torch.frombuffer(bytearray(items), dtype=torch.uint8)}
    for part in ("mean", "std", "probe"):
        tensors |= {f"{part}/{name}": tensor for name, tensor in getattr(conditioner, part).items()}
    metadata: dict[str, Any] = {name: getattr(conditioner, name) for name in ("kind", "made_of", "scale", "cosine", "adapter")}
    if conditioner.net is not None:
        tensors |= {f"net/{name}": tensor for name, tensor in conditioner.net.state_dict().items()}
        metadata |= {"shapes": conditioner.net.shapes, "masks": conditioner.net.masks}
    write_sealed(path, tensors, {"conditioner": json.dumps({"format": FORMAT, **metadata})})


def load_conditioner(path: Path) -> Conditioner | None:
    """A saved conditioner; None if there is none or it cannot be used, in which case it is fitted again."""
    parts: dict[str, dict[str, Tensor]] = {"net": {}, "mean": {}, "std": {}, "probe": {}}
    try:
        tensors, header = read_sealed(path)
        metadata = parse_json(header["conditioner"], limit=MAX_METADATA)
        if metadata["format"] != FORMAT:
            return None
        items = parse_json(bytes(tensors.pop("items").numpy()), limit=MAX_ITEMS)
        embeddings = tensors.pop("embeddings").float()
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        weights = parts.pop("net")
        fitted = Conditioner(
            str(metadata["kind"]),
            str(metadata["made_of"]),
            items,
            embeddings,
            _net(embeddings.shape[1], metadata, weights) if "shapes" in metadata else None,
            float(metadata["scale"]),
            cosine=float(metadata["cosine"]),
            adapter=str(metadata["adapter"]),
            **parts,
        )
        _check(fitted)
        return fitted
    except FileNotFoundError:
        return None
    except Exception as error:  # the file may be damaged, or forged, in any way
        say(f"the saved conditioner cannot be used and is fitted again ({error}: {path})")
        return None


def _net(dim: int, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ConditionerNet:
    """The map with these weights. Allocates no memory for shapes that the file only claims."""
    shapes = {name: tuple(shape) for name, shape in metadata["shapes"].items()}
    sides = [side for shape in shapes.values() for side in shape]
    if len(shapes) > MAX_PARTS or not all(type(side) is int and 0 < side <= MAX_SIDE for side in sides):
        raise ValueError("invalid shapes")
    with torch.device("meta"):
        net = ConditionerNet(dim, shapes, list(metadata["masks"]))
    net.load_state_dict(tensors, assign=True)
    return net.eval().requires_grad_(False)


def _check(conditioner: Conditioner) -> None:
    """Raise ValueError if parts are inconsistent or not finite: the file is untrusted."""
    items, embeddings, net = conditioner.items, conditioner.embeddings, conditioner.net
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items) or embeddings.shape[:1] != (len(items),):
        raise ValueError("items and embeddings do not match")
    if net is not None:
        for name in net.shapes.keys() - set(net.masks):
            conditioner.mean[name].expand(net.shapes[name]), conditioner.std[name].expand(net.shapes[name])
    weights = net.state_dict() if net is not None else {}
    floats = [embeddings, *weights.values(), *conditioner.mean.values(), *conditioner.std.values(), *conditioner.probe.values()]
    floats.append(torch.tensor([conditioner.scale, conditioner.cosine]))
    if not all(tensor.is_floating_point() and bool(torch.isfinite(tensor).all()) for tensor in floats):
        raise ValueError("it contains NaN or infinity")
