"""Trains `starter:openmoji-64`, the starter's text-to-image model: python openmoji64.py --work /tmp/openmoji64

Three stages, each of which can be resumed: an autoencoder, a diffusion transformer on its latents, and both the transformer and
the decoder. The model is then written as half-precision safetensors in diffusers' layout. All pictures of
`starter:openmoji` are used: its split `test` is for bridges, and the generator should draw every picture of its gallery.

Training continues from the weights in the repository, or starts afresh with `--fresh`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from bridgekit_starter.generator import FOLDER, GUIDANCE, STEPS, SentenceConditioning, open_generator
from bridgekit_starter.openmoji import build
from bridgekit_starter.text import TextEncoder
from bridgekit_starter.tokens import TokenHead
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, batch_norm, l1_loss, mse_loss, normalize

from bridgekit.diffusion.models import DrawOptions, draw
from bridgekit.storage.cache import write_atomically

SEED = 0
CHECKPOINT_SECONDS = 120
AUTOENCODER_STEPS, AUTOENCODER_BATCH = 6_325, 16
TRANSFORMER_STEPS, TRANSFORMER_BATCH = 1_430, 96
TOGETHER_STEPS, TOGETHER_BATCH = 4_450, 48
#: With `--fresh`, all stages have so many times the steps. Not tried.
FRESH = 3
#: Latent channels. With 8, an 8 x 8 patch of pixels did not keep both outlines and colours.
CHANNELS = 16
#: Maximum standard deviation of the noise added to standardised latents, so that details survive the transformer's errors.
LATENT_NOISE = 0.3
#: How far the latents to predict move towards predicted ones, each time.
FOLLOW = 0.1
#: The logarithm of the posterior's variance in the exported encoder. Only its mean is trained.
LOG_VARIANCE = -10.0
#: Maximum norm of the noise added to unit sentence vectors in training, because a bridge's vectors are not exact.
TEXT_NOISE = 0.5
#: Fraction of rows trained with the tokens of a zero vector, for classifier-free guidance.
UNCONDITIONAL = 0.1
#: Prompt templates; most rows have only the name.
TEMPLATES = ("{}", "{}", "{}", "a {}", "a picture of a {}", "an emoji of {}")


def pictures() -> tuple[Tensor, list[str]]:
    """The images (n, 3, 64, 64) from -1 to 1, and their names."""
    pairs = build()
    images = []
    for file in pairs.columns["image"]:
        with Image.open(str(file)) as image:
            images.append(np.asarray(image.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    # Convolutions are faster with channels last.
    return pixels.contiguous(memory_format=torch.channels_last), [str(name) for name in pairs.columns["text"]]


def new_autoencoder() -> AutoencoderKL:
    """64 x 64 pixels to 8 x 8 latents of 16 channels and back."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=CHANNELS,
        # One group: with groups of two channels, images of few flat colours lose their colours.
        norm_num_groups=1,
        sample_size=64,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def new_transformer() -> PixArtTransformer2DModel:
    """Noisy latents and 16 tokens to v. Patches of 2 x 2 give only 16 positions, which allows more parameters."""
    return PixArtTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=64,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=5,
        cross_attention_dim=384,
        sample_size=8,
        patch_size=2,
        caption_channels=TokenHead.WIDTH,
        use_additional_conditions=False,
    )


class Run:
    """A stage's weights, moving average, optimizer, step and losses by picture, checkpointed in one file without pickle."""

    def __init__(self, file: Path, model: nn.Module, steps: int, rates: dict[tuple[nn.Module, ...], float], count: int) -> None:
        self.file, self.model, self.steps, self.rates = file, model, steps, list(rates.values())
        self.groups = [[weight for module in modules for weight in module.parameters()] for modules in rates]
        groups = [{"params": group, "lr": rate} for group, rate in zip(self.groups, self.rates, strict=True)]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.average = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self.losses = torch.ones(count)
        self.step, self.seconds = 0, 0.0
        if file.exists():
            self._load()

    def __iter__(self) -> Iterator[int]:
        """The remaining steps. Each is seeded by its number, so a resumed run equals an uninterrupted one."""
        clock = saved = time.monotonic()
        while self.step < self.steps:
            torch.manual_seed(SEED * 1_000_003 + self.step)
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * rate_at(self.step, self.steps)
            yield self.step
            self.step += 1
            now = time.monotonic()
            self.seconds, clock = self.seconds + now - clock, now
            if now - saved > CHECKPOINT_SECONDS or self.step == self.steps:
                self._save()
                saved = now

    def rows(self, size: int) -> Tensor:
        """Random rows: half of them uniform, half more often the larger their loss."""
        hard = torch.multinomial(self.losses.clamp(max=4 * self.losses.mean()), size - size // 2, replacement=True)
        return torch.cat([torch.randint(len(self.losses), (size // 2,)), hard])

    @torch.no_grad()
    def record(self, rows: Tensor, losses: Tensor) -> None:
        """Average the rows' losses over the times that they were seen."""
        self.losses[rows] = 0.6 * self.losses[rows] + 0.4 * losses

    def update(self, loss: Tensor) -> None:
        """One step of the optimizer and, every fifth time, of the moving average."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for group in self.groups:
            nn.utils.clip_grad_norm_(group, 1.0)
        self.optimizer.step()
        if self.step % 5 == 0:
            decay = min(0.998, (1 + self.step) / (10 + self.step)) ** 5
            with torch.no_grad():
                for name, tensor in self.model.state_dict().items():
                    self.average[name].lerp_(tensor, 1 - decay)

    def _save(self) -> None:
        tensors = {f"now/{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"average/{name}": tensor for name, tensor in self.average.items()}
        for number, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{number}/{name}": tensor for name, tensor in values.items()}
        tensors = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()} | {"losses": self.losses}
        metadata_ = {"state": json.dumps({"step": self.step, "seconds": self.seconds})}
        write_atomically(self.file, lambda aside: save_file(tensors, aside, metadata_), own_folder=True)

    def _load(self) -> None:
        with safe_open(self.file, "pt") as file:
            metadata_ = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is not a mapping)
        parts: dict[str, dict[str, Tensor]] = {"now": {}, "average": {}, "optimizer": {}}
        self.losses = tensors.pop("losses")
        for key, tensor in tensors.items():
            part, name = key.split("/", 1)
            parts[part][name] = tensor
        self.model.load_state_dict(parts["now"])
        self.average = parts["average"]
        whole = self.optimizer.state_dict()
        for key, tensor in parts["optimizer"].items():
            number, name = key.split("/", 1)
            whole["state"].setdefault(int(number), {})[name] = tensor
        self.optimizer.load_state_dict(whole)
        self.step, self.seconds = metadata_["step"], metadata_["seconds"]


def rate_at(step: int, steps: int) -> float:
    """Learning-rate factor: warm-up over 100 steps, then cosine decay to 0.01."""
    return min(1.0, (step + 1) / 100) * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)


def train_autoencoder(work: Path, pixels: Tensor, model: AutoencoderKL, longer: int) -> AutoencoderKL:
    """Train with `picture_distance` on noisy latents, standardised per channel. Returns the averaged weights."""
    torch.manual_seed(SEED)
    model.requires_grad_(True).train().to(memory_format=torch.channels_last)
    run = Run(work / "autoencoder.safetensors", model, longer * AUTOENCODER_STEPS, {(model,): 1.5e-3}, len(pixels))
    for step in run:
        rows = run.rows(AUTOENCODER_BATCH)
        real = pixels[rows]
        with torch.autocast("cpu", torch.bfloat16):
            mean = model.encode(real).latent_dist.mean
        latents = batch_norm(mean.float(), None, None, training=True)
        noise_length = torch.rand(AUTOENCODER_BATCH, 1, 1, 1) * LATENT_NOISE
        noise_length[::4] = 0
        with torch.autocast("cpu", torch.bfloat16):
            made = model.decode(latents + noise_length * torch.randn_like(latents)).sample.float()
        run.record(rows, (made - real).abs().mean((1, 2, 3)))
        run.update(picture_distance(made, real))
        if step % 100 == 0:
            print(f"autoencoder {step:5} L1 {l1_loss(made, real):.4f} {run.seconds / 60:.1f} min", flush=True)
    model.load_state_dict(run.average)
    standardise(model.eval(), pixels)
    return model


def picture_distance(made: Tensor, real: Tensor) -> Tensor:
    """L1 at three scales and on edges, MSE for large errors, and both on the colours alone."""
    distance = l1_loss(made, real) + 2 * mse_loss(made, real)
    for k in (2, 4):
        distance = distance + l1_loss(avg_pool2d(made, k), avg_pool2d(real, k)) / 2
    for axis in (2, 3):
        distance = distance + l1_loss(made.diff(dim=axis), real.diff(dim=axis))
    tint, true_tint = (picture - picture.mean(1, keepdim=True) for picture in (made, real))
    return distance + 2 * l1_loss(tint, true_tint) + 4 * mse_loss(tint, true_tint)


@torch.no_grad()
def standardise(model: AutoencoderKL, pixels: Tensor) -> None:
    """Replace the batch norm of training by a change of the 1 x 1 convolution before it, and the variance by a constant."""
    latents = encode(model, pixels)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    into = model.quant_conv
    into.weight[:CHANNELS] /= std[:, None, None, None]
    into.bias[:CHANNELS] = (into.bias[:CHANNELS] - mean) / std
    into.weight[CHANNELS:] = 0
    into.bias[CHANNELS:] = LOG_VARIANCE


@torch.no_grad()
def encode(model: AutoencoderKL, pixels: Tensor) -> Tensor:
    """(n, 3, 64, 64) to (n, 16, 8, 8): the posterior mean."""
    return torch.cat([model.encode(part).latent_dist.mean for part in torch.split(pixels, 64)])


class Painter(nn.Module):
    """What the last two stages change: the token head, the transformer, the decoder, and the latents to predict."""

    latents: Tensor

    def __init__(
        self, head: TokenHead, transformer: PixArtTransformer2DModel, autoencoder: AutoencoderKL, latents: Tensor
    ) -> None:
        super().__init__()
        self.register_buffer("latents", latents.clone())
        self.head, self.transformer = head, transformer
        self.decoder, self.post_quant_conv = autoencoder.decoder, autoencoder.post_quant_conv

    def decode(self, latents: Tensor) -> Tensor:
        """(n, 16, 8, 8) to (n, 3, 64, 64)."""
        pixels: Tensor = self.decoder(self.post_quant_conv(latents.contiguous(memory_format=torch.channels_last)))
        return pixels


def noise_schedule() -> DDPMScheduler:
    """Zero terminal SNR, so that the first sampling step depends on the text."""
    return DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        clip_sample=False,
    )


def train_painter(
    file: Path, pixels: Tensor, names: list[str], model: Painter, steps: int, size: int, *, together: bool
) -> None:
    """v-prediction, in place; two thirds of the timesteps are the noisiest tenth, where the text matters most.

    If `together`, the latents predicted at those timesteps are also decoded and compared with the pictures, which trains the
    decoder on the transformer's errors, and the transformer on errors that are seen. The latents to predict slowly follow the
    predicted ones, so that the two losses do not pull in different directions.
    """
    torch.manual_seed(SEED)
    model.requires_grad_(True).train()
    model.transformer.set_attn_processor(AttnProcessor())  # torch's own attention is slow on a CPU with 16 positions
    compiled = torch.compile(
        lambda noisy, vectors, times: predict(model.transformer, noisy, model.head(vectors), times), dynamic=False
    )
    schedule = noise_schedule()
    texts = sentences(names)
    rates: dict[tuple[nn.Module, ...], float] = {
        (model.head, model.transformer): 4e-4,
        (model.decoder, model.post_quant_conv): 1e-3,
    }
    run = Run(file, model, steps, rates, len(names))
    early = slice(2 * size // 3)
    for step in run:
        rows = torch.cat([run.rows(early.stop), torch.randint(len(names), (size - early.stop,))])
        real = model.latents[rows]
        noise = torch.randn_like(real)
        times = torch.randint(0, 1000, (size,))
        times[early] = torch.randint(900, 1000, (early.stop,))
        times[early][::4] = 999
        template = torch.where(torch.rand(size) < 0.5, 0, torch.randint(len(texts), (size,)))
        vectors = texts[template, rows]
        noise_length = torch.rand(size, 1) * TEXT_NOISE / vectors.shape[1] ** 0.5 * (torch.rand(size, 1) < 0.5)
        vectors = normalize(vectors + torch.randn_like(vectors) * noise_length, dim=-1)
        conditional = torch.rand(size, 1) >= UNCONDITIONAL
        conditional[early] = True
        noisy = schedule.add_noise(real, noise, times)
        with torch.autocast("cpu", torch.bfloat16):
            made = compiled(noisy, vectors * conditional, times).float()
        errors = (made - schedule.get_velocity(real, noise, times)).square().mean((1, 2, 3))
        loss, losses = errors.mean(), errors[early]
        if together:
            share = schedule.alphas_cumprod[times[early]].view(-1, 1, 1, 1)
            predicted = share.sqrt() * noisy[early] - (1 - share).sqrt() * made[early]
            with torch.autocast("cpu", torch.bfloat16):
                seen = model.decode(predicted).float()
            model.latents[rows[early]] = real[early].lerp(predicted.detach(), FOLLOW)
            loss = loss + picture_distance(seen, pixels[rows[early]])
            losses = losses + 2 * (seen - pixels[rows[early]]).abs().mean((1, 2, 3))
        run.record(rows[early], losses)
        run.update(loss)
        if step % 100 == 0:
            print(f"{file.stem} {step:5} v {errors.mean():.4f} loss {loss:.4f} {run.seconds / 60:.1f} min", flush=True)
    model.load_state_dict(run.average)
    model.eval()


@torch.no_grad()
def sample(model: Painter, vectors: Tensor, seed: int = SEED) -> Tensor:
    """Latents for sentence vectors, sampled like the exported pipeline, with the plugin's steps and guidance."""
    schedule = DPMSolverMultistepScheduler.from_config(noise_schedule().config, timestep_spacing="trailing")
    schedule.set_timesteps(STEPS)
    tokens = torch.cat([model.head(vectors), model.head(torch.zeros_like(vectors))])
    latents = torch.randn(len(vectors), CHANNELS, 8, 8, generator=torch.Generator().manual_seed(seed))
    for time_ in schedule.timesteps:
        with torch.autocast("cpu", torch.bfloat16):
            both = predict(model.transformer, latents.repeat(2, 1, 1, 1), tokens, time_.expand(len(tokens)))
        conditional, unconditional = both.float().chunk(2)
        latents = schedule.step(unconditional + GUIDANCE * (conditional - unconditional), time_, latents).prev_sample
    return latents


def predict(transformer: PixArtTransformer2DModel, noisy: Tensor, tokens: Tensor, times: Tensor) -> Tensor:
    """v, called as in the pipeline."""
    made: Tensor = transformer(
        noisy,
        encoder_hidden_states=tokens,
        timestep=times,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]
    return made


def sentence_vectors(texts: list[str]) -> Tensor:
    """(n, 384) sentence vectors by the starter's MiniLM, this model's text encoder."""
    encoder = TextEncoder()
    parts = [texts[start : start + 64] for start in range(0, len(texts), 64)]
    return torch.cat([encoder.encode([encoder.prepare(text) for text in part]) for part in parts]).clone()


def sentences(names: list[str]) -> Tensor:
    """(templates, n, 384): sentence vectors of each name in each template."""
    return torch.stack([sentence_vectors([template.format(name) for name in names]) for template in TEMPLATES])


def main() -> None:
    """Run the remaining stages."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--work", type=Path, required=True, help="folder for checkpoints and samples")
    options.add_argument("--fresh", action="store_true", help="start with random weights")
    arguments = options.parse_args()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    longer = FRESH if arguments.fresh else 1
    autoencoder, transformer, head = new_autoencoder(), new_transformer(), TokenHead()
    if not arguments.fresh:
        known = open_generator("cpu")
        [conditioning] = known.conditionings
        assert isinstance(conditioning, SentenceConditioning)
        autoencoder, transformer, head = known.pipeline.vae, known.pipeline.transformer, conditioning.head
    pixels, names = pictures()
    train_autoencoder(work, pixels, autoencoder, longer)
    latents = encode(autoencoder, pixels)
    painter = Painter(head, transformer, autoencoder, latents)
    steps, more = longer * TRANSFORMER_STEPS, longer * TOGETHER_STEPS
    train_painter(work / "transformer.safetensors", pixels, names, painter, steps, TRANSFORMER_BATCH, together=False)
    train_painter(work / "together.safetensors", pixels, names, painter, more, TOGETHER_BATCH, together=True)
    print(f"the latents moved by {mse_loss(painter.latents, latents):.4f} (MSE)", flush=True)
    shown = slice(None, None, 40)
    with torch.no_grad():
        tiles = [
            pixels[shown],
            autoencoder.decode(latents[shown]).sample,
            painter.decode(sample(painter, sentence_vectors(names[shown]))),
        ]
    sheet(
        torch.cat([row for part in zip(*(torch.split(tile, 24) for tile in tiles), strict=True) for row in part]),
        work / "sheet.png",
    )
    export(autoencoder, painter, FOLDER)
    compare_settings(pixels[::8], names[::8])


def export(autoencoder: AutoencoderKL, painter: Painter, folder: Path) -> None:
    """Write a PixArt pipeline without text encoder in half precision, the head, and each file's SHA-256."""
    schedule = DPMSolverMultistepScheduler.from_config(noise_schedule().config, timestep_spacing="trailing")
    autoencoder.to(memory_format=torch.contiguous_format)
    pipeline = PixArtAlphaPipeline(
        tokenizer=None, text_encoder=None, vae=autoencoder, transformer=painter.transformer, scheduler=schedule
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    head = {name: tensor.half().contiguous() for name, tensor in painter.head.state_dict().items()}
    save_file(head, folder / "head.safetensors")
    files = [file for file in sorted(folder.rglob("*.*")) if file.suffix in (".json", ".safetensors")]
    hashes = {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    hashes.pop("sha256.json", None)
    (folder / "sha256.json").write_text(json.dumps(hashes, indent=2) + "\n")


def compare_settings(pixels: Tensor, names: list[str]) -> None:
    """Print the pixel error of the exported model by steps and guidance."""
    model = open_generator("cpu")
    conditioning = model.conditionings[0]
    tensors = conditioning.encode(names)
    for steps, guidance in ((2, 1.0), (3, 1.0), (4, 1.0), (10, 1.0), (2, 1.5), (10, 1.5)):
        made = draw(model, conditioning, tensors, DrawOptions(steps=steps, guidance=guidance), seeds=SEED)
        error = l1_loss(torch.stack([to_pixels(picture) for picture in made]), pixels)
        print(f"{steps} steps, guidance {guidance}: L1 {error:.4f}", flush=True)


def to_pixels(picture: Image.Image) -> Tensor:
    """(3, 64, 64) from -1 to 1."""
    return torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1).float() / 127.5 - 1


def sheet(pixels: Tensor, file: Path, columns: int = 24) -> None:
    """A contact sheet of pictures in rows of 24."""
    tiles = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    rows = [np.concatenate(list(tiles[start : start + columns]), 1) for start in range(0, len(tiles), columns)]
    Image.fromarray(np.concatenate(rows)).save(file)


if __name__ == "__main__":
    main()
