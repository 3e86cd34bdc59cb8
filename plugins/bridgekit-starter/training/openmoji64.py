"""Trains `starter:openmoji-64`, the starter's text-to-image model: python openmoji64.py --work /tmp/openmoji64

Three stages, each of which can be resumed: an autoencoder (30 minutes on 2 cores), a diffusion transformer on its latents (an
hour), and fine-tuning the decoder on the transformer's latents (15 minutes). The model is then written as half-precision
safetensors in diffusers' layout. Names of the split `test` are not used.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from bridgekit_starter.generator import FOLDER, GUIDANCE, STEPS, open_generator
from bridgekit_starter.openmoji import build, split_of
from bridgekit_starter.text import TextEncoder
from bridgekit_starter.tokens import TokenHead
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, l1_loss, mse_loss, normalize, pad

from bridgekit.diffusion.models import DrawOptions, draw
from bridgekit.storage.cache import write_atomically

SEED = 0
CHECKPOINT_SECONDS = 120
AUTOENCODER_STEPS, AUTOENCODER_BATCH = 6_000, 16
#: Outlines are learned first, colours slowly: from this step, colours have more weight. (Chosen during training.)
COLOURS_FROM = 3_087
TRANSFORMER_STEPS, TRANSFORMER_BATCH = 4_500, 128
#: Latent channels. With 8, an 8 x 8 patch of pixels did not keep both outlines and colours.
CHANNELS = 16
POLISH_STEPS, POLISH_BATCH, POLISH_SAMPLES = 3_500, 32, 2
#: Weight of the KL term. It costs sharpness and makes the decoder robust to errors in the latents.
KL_WEIGHT = 3e-4
#: Maximum norm of the noise added to unit sentence vectors in training, because a bridge's vectors are not exact.
TEXT_NOISE = 0.5
#: Fraction of rows trained with the tokens of a zero vector, for classifier-free guidance.
UNCONDITIONAL = 0.1
#: Prompt templates; most rows have only the name.
TEMPLATES = ("{}", "{}", "{}", "a {}", "a picture of a {}", "an emoji of {}")


def pictures(held_out: bool) -> tuple[Tensor, list[str]]:
    """The images (n, 3, 64, 64) from -1 to 1, and their names: those held out, or all others."""
    pairs = build()
    rows = [row for row, name in enumerate(pairs.columns["text"]) if (split_of(str(name)) == "test") == held_out]
    images = []
    for row in rows:
        with Image.open(str(pairs.columns["image"][row])) as image:
            images.append(np.asarray(image.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels, [str(pairs.columns["text"][row]) for row in rows]


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
    """A stage's weights, their moving average, optimizer and step, checkpointed in one file without pickle."""

    def __init__(self, file: Path, model: nn.Module, steps: int, lr: float, average: float) -> None:
        self.file, self.model, self.steps, self.lr, self.decay = file, model, steps, lr, average
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.average = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self.step, self.seconds = 0, 0.0
        if file.exists():
            self._load()

    def __iter__(self) -> Iterator[int]:
        """The remaining steps. Each is seeded by its number, so a resumed run equals an uninterrupted one."""
        clock = saved = time.monotonic()
        while self.step < self.steps:
            torch.manual_seed(SEED * 1_000_003 + self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * rate_at(self.step, self.steps)
            yield self.step
            self.step += 1
            now = time.monotonic()
            self.seconds, clock = self.seconds + now - clock, now
            if now - saved > CHECKPOINT_SECONDS or self.step == self.steps:
                self._save()
                saved = now

    def update(self, loss: Tensor) -> None:
        """One step of the optimizer and of the moving average."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                self.average[name].lerp_(tensor, 1 - decay)

    def _save(self) -> None:
        tensors = {f"now/{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"average/{name}": tensor for name, tensor in self.average.items()}
        for number, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{number}/{name}": tensor for name, tensor in values.items()}
        tensors = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
        metadata_ = {"state": json.dumps({"step": self.step, "seconds": self.seconds})}
        write_atomically(self.file, lambda aside: save_file(tensors, aside, metadata_), own_folder=True)

    def _load(self) -> None:
        with safe_open(self.file, "pt") as file:
            metadata_ = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is not a mapping)
        parts: dict[str, dict[str, Tensor]] = {"now": {}, "average": {}, "optimizer": {}}
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


def train_autoencoder(work: Path, pixels: Tensor) -> AutoencoderKL:
    """Train with `picture_distance` and a small KL term. Returns the averaged weights, normalised."""
    torch.manual_seed(SEED)
    model = new_autoencoder()
    run = Run(work / "autoencoder.safetensors", model, AUTOENCODER_STEPS, 1.5e-3, 0.995)
    for step in run:
        real = jitter(pixels[torch.randint(len(pixels), (AUTOENCODER_BATCH,))])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(real).latent_dist
            made = model.decode(posterior.sample()).sample.float()
        distance = picture_distance(made, real, colours=step >= COLOURS_FROM)
        spread = (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean() / 2
        run.update(distance + KL_WEIGHT * spread)
        if step % 100 == 0:
            print(f"autoencoder {step:5} L1 {l1_loss(made, real):.4f} KL {spread:.2f} {run.seconds / 60:.1f} min", flush=True)
    model.load_state_dict(run.average)
    normalise(model.eval(), pixels)
    return model


def picture_distance(made: Tensor, real: Tensor, *, colours: bool) -> Tensor:
    """L1 at three scales and on edges, plus MSE for large errors and, if `colours`, both on the colours alone."""
    distance = l1_loss(made, real) + 2 * mse_loss(made, real)
    for k in (2, 4):
        distance = distance + l1_loss(avg_pool2d(made, k), avg_pool2d(real, k)) / 2
    for axis in (2, 3):
        distance = distance + l1_loss(made.diff(dim=axis), real.diff(dim=axis))
    if colours:
        tint, true_tint = (picture - picture.mean(1, keepdim=True) for picture in (made, real))
        distance = distance + 2 * l1_loss(tint, true_tint) + 4 * mse_loss(tint, true_tint)
    return distance


def jitter(pixels: Tensor) -> Tensor:
    """Flip the whole batch at random and shift it by up to 3 pixels over white."""
    if torch.rand(()) < 0.5:
        pixels = pixels.flip(3)
    top, left = torch.randint(0, 7, (2,)).tolist()
    return pad(pixels, (3, 3, 3, 3), value=1.0)[:, :, top : top + 64, left : left + 64]


@torch.no_grad()
def normalise(model: AutoencoderKL, pixels: Tensor) -> None:
    """Standardise the latents of `pixels` per channel by changing the two 1 x 1 convolutions around them."""
    latents = encode(model, pixels)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    into, out, channels = model.quant_conv, model.post_quant_conv, len(mean)
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= std[None, :, None, None]
    into.weight[:channels] /= std[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - mean) / std
    into.bias[channels:] -= 2 * std.log()


@torch.no_grad()
def encode(model: AutoencoderKL, pixels: Tensor) -> Tensor:
    """(n, 3, 64, 64) to (n, 16, 8, 8): the posterior mean."""
    return torch.cat([model.encode(part).latent_dist.mean for part in torch.split(pixels, 64)])


class Painter(nn.Module):
    """The modules trained in the second stage: the token head and the transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.head = TokenHead()
        self.transformer = new_transformer()
        # Auxiliary task: predict patch i from token i. So the cheap head learns what the image looks like, and the expensive
        # transformer only how to draw it. Not exported.
        self.predict_patches = nn.Linear(TokenHead.WIDTH, 4 * CHANNELS)


def patches(latents: Tensor) -> Tensor:
    """(n, 16, 8, 8) to (n, 16 patches, 64): the latents of each 2 x 2 patch."""
    return latents.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


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


def train_transformer(work: Path, latents: Tensor, names: list[str], look: Callable[[Painter, int], None]) -> Painter:
    """v-prediction on fixed latents; half of the timesteps are from the noisiest tenth, where the text matters most."""
    torch.manual_seed(SEED)
    model, schedule = Painter(), noise_schedule()
    texts = sentences(names)
    run = Run(work / "transformer.safetensors", model, TRANSFORMER_STEPS, 8e-4, 0.998)
    size = TRANSFORMER_BATCH
    for step in run:
        rows = torch.randint(len(latents), (size,))
        real, noise = latents[rows], torch.randn(size, *latents.shape[1:])
        times = torch.where(torch.arange(size) < size // 2, torch.randint(900, 1000, (size,)), torch.randint(0, 1000, (size,)))
        vectors = texts[torch.randint(len(texts), (size,)), rows]
        noise_length = torch.rand(size, 1) * TEXT_NOISE / vectors.shape[1] ** 0.5
        vectors = normalize(vectors + torch.randn_like(vectors) * noise_length, dim=-1)
        conditional = torch.rand(size, 1) >= UNCONDITIONAL
        vectors = vectors * conditional
        with torch.autocast("cpu", torch.bfloat16):
            tokens = model.head(vectors)
            made = predict(model.transformer, schedule.add_noise(real, noise, times), tokens, times)
            predicted = model.predict_patches(tokens)
        v_loss = mse_loss(made.float(), schedule.get_velocity(real, noise, times))
        conditional_loss = ((predicted.float() - patches(real)).square().mean((1, 2)) * conditional[:, 0]).mean()
        run.update(v_loss + 0.5 * conditional_loss)
        if step % 50 == 0:
            print(
                f"transformer {step:5} v {v_loss:.4f} predicted {conditional_loss:.4f} {run.seconds / 60:.1f} min", flush=True
            )
        if step % 500 == 499:
            averaged = Painter()
            averaged.load_state_dict(run.average)
            look(averaged.eval(), step + 1)
    model.load_state_dict(run.average)
    return model.eval()


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


def polish_decoder(
    work: Path, autoencoder: AutoencoderKL, painter: Painter, pixels: Tensor, latents: Tensor, names: list[str]
) -> None:
    """Fine-tune the decoder, in place, to reconstruct the images from the transformer's latents for training names.

    Half of a batch has the transformer's latents, half the encoder's with a little noise. The encoder, and so the transformer's
    targets, stay fixed.
    """
    torch.manual_seed(SEED)
    vectors = sentence_vectors(names)
    with torch.no_grad():
        drawn = torch.stack([sample(painter, vectors, seed=seed) for seed in range(POLISH_SAMPLES)])
    learns = nn.ModuleDict({"decoder": autoencoder.decoder, "post_quant_conv": autoencoder.post_quant_conv})
    run = Run(work / "decoder.safetensors", learns, POLISH_STEPS, 1e-3, 0.995)
    half = POLISH_BATCH // 2
    for step in run:
        rows = torch.randint(len(pixels), (POLISH_BATCH,))
        own = drawn[torch.randint(POLISH_SAMPLES, (half,)), rows[:half]]
        encoded = latents[rows[half:]]
        seen = torch.cat([own, encoded + 0.1 * torch.randn_like(encoded)])
        with torch.autocast("cpu", torch.bfloat16):
            made = autoencoder.decode(seen).sample.float()
        distance = picture_distance(made, pixels[rows], colours=True)
        run.update(distance)
        if step % 100 == 0:
            parts = [l1_loss(made[part], pixels[rows][part]) for part in (slice(half), slice(half, None))]
            print(f"decoder {step:5} L1 drawn {parts[0]:.4f} encoded {parts[1]:.4f} {run.seconds / 60:.1f} min", flush=True)
    learns.load_state_dict(run.average)


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
    work: Path = options.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    pixels, names = pictures(held_out=False)
    unseen, unseen_names = pictures(held_out=True)
    autoencoder = train_autoencoder(work, pixels)
    with torch.no_grad():
        again = torch.cat([autoencoder.decode(part).sample for part in torch.split(encode(autoencoder, unseen[:48]), 16)])
    print(f"autoencoder, held-out images: L1 {l1_loss(again, unseen[:48]):.4f}", flush=True)
    sheet(torch.cat([unseen[:24], again[:24], unseen[24:48], again[24:]]), work / "autoencoder.png")
    latents, latents_unseen = encode(autoencoder, pixels), encode(autoencoder, unseen)
    shown, shown_unseen = sentence_vectors(names[::70][:24]), sentence_vectors(unseen_names[:24])

    @torch.no_grad()
    def look(model: Painter, step: int) -> None:
        """Save images of training and held-out names below the true ones, and print their error."""
        rows = []
        for vectors, real in ((shown, latents[::70][:24]), (shown_unseen, latents_unseen[:24])):
            made = sample(model, vectors)
            print(f"  step {step}: MSE of latents {mse_loss(made, real):.3f}, variance {real.var():.3f}", flush=True)
            rows += [autoencoder.decode(real).sample, autoencoder.decode(made).sample]
        sheet(torch.cat(rows), work / f"look-{step:05}.png")

    painter = train_transformer(work, latents, names, look)
    polish_decoder(work, autoencoder, painter, pixels, latents, names)
    export(autoencoder, painter, FOLDER)
    compare_settings(pixels[::8], names[::8])


def export(autoencoder: AutoencoderKL, painter: Painter, folder: Path) -> None:
    """Write a PixArt pipeline without text encoder in half precision, the head, and each file's SHA-256."""
    schedule = DPMSolverMultistepScheduler.from_config(noise_schedule().config, timestep_spacing="trailing")
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
    for steps, guidance in ((4, 1.0), (6, 1.0), (10, 1.0), (15, 1.0), (10, 1.5), (10, 2.0)):
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
