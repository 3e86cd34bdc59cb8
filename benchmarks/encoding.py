"""Encoding compared with other libraries on the same weights: items per second, and cosine between the vectors.

python benchmarks/encoding.py (the peers come with `pip install -e ".[bench]"`)
"""

from __future__ import annotations

import ast
import gc
import os
import random
import shutil
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from bridgekit_starter.weights import EFFICIENTNET_WEIGHTS, MINILM_CONFIG, WHISPER_PARTS
from common import ESC10, table
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from bridgekit import load_encoder, read_pairs
from bridgekit.encoders import Item
from bridgekit.latents.encode import encode_items

#: Encodes items to one vector each; this is what is timed.
Encode = Callable[[Sequence[Item]], Tensor]
Padding = Literal["zeros", "silence", "none"]

TEXTS, PICTURES, PHOTOGRAPHS, CLIPS = 1_000, 150, 100, 12
ROUNDS = 3
#: Items to encode first, untimed.
WARM_UP = 8
#: The peers' batch size: the default of sentence-transformers and of bridgekit.
BATCH = 32
#: Start of the last layer in the 1,024 dimensions of `starter:speech`. The peer returns only that layer.
LAST_LAYER = 512
#: Samples at 16 kHz per frame of Whisper's encoder.
FRAME = 320


@dataclass(frozen=True)
class Timed:
    """Times and vectors of one method.

    Arguments:
        seconds: one per round; empty if only the vectors are compared.
        vectors: (n, d) of the last round.
    """

    seconds: Sequence[float]
    vectors: Tensor


def alternate(sides: Mapping[str, Encode], items: Sequence[Item], rounds: int = ROUNDS) -> dict[str, Timed]:
    """Run the methods in alternating rounds, so that changes in the machine's speed affect all of them."""
    for encode in sides.values():
        encode(items[:WARM_UP])
    # faster-whisper collects garbage after every file; exclude the objects that this program has loaded.
    gc.collect()
    gc.freeze()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    vectors: dict[str, Tensor] = {}
    for _ in range(rounds):
        for name, encode in sides.items():
            started = time.perf_counter()
            vectors[name] = encode(items)
            seconds[name].append(time.perf_counter() - started)
    return {name: Timed(seconds[name], vectors[name]) for name in sides}


def bridgekit(name: str) -> Encode:
    """Encode into an empty cache: hash, decode, encode, write, read back."""
    encoder = load_encoder(name, "cpu")

    def encode(items: Sequence[Item]) -> Tensor:
        with tempfile.TemporaryDirectory() as folder:
            latents = encode_items(encoder, items, folder=Path(folder))
        assert not latents.failed
        return latents.matrix[latents.ids]

    return encode


def row(kind: str, name: str, ours: Timed, peer: str, theirs: Timed) -> list[str]:
    """A row of the table. Vectors of different sizes are compared over their last dimensions."""
    n = len(ours.vectors)
    ratios = [their / our for our, their in zip(ours.seconds, theirs.seconds, strict=False)]
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "not timed"
    own = ours.vectors[:, -theirs.vectors.shape[1] :]
    # Subtract the same mean from both: separate means would hide an offset between them.
    mean = theirs.vectors.mean(0)
    raw, centred = cosine_similarity(own, theirs.vectors), cosine_similarity(own - mean, theirs.vectors - mean)
    rates = [f"{n / statistics.median(side.seconds):,.1f}" if side.seconds else "not timed" for side in (ours, theirs)]
    return [kind, name, rates[0], peer, rates[1], spread, *(f"{each.min():.4f}, {each.mean():.4f}" for each in (raw, centred))]


# ---- text


def docstrings(count: int) -> list[str]:
    """Distinct docstrings of Python's standard library, sampled with a fixed seed: from a few words to several pages."""
    library = Path(sysconfig.get_path("stdlib"))
    found = set()
    for path in sorted(library.rglob("*.py")):
        if {"test", "tests", "site-packages"} & set(path.relative_to(library).parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                found.add((ast.get_docstring(node) or "").strip())
    return random.Random(0).sample(sorted(found - {""}), count)


def sentence_transformers() -> Encode:
    """all-MiniLM-L6-v2 by sentence-transformers, from the same folder: 256 tokens, mean pooling, unit length."""
    from sentence_transformers import SentenceTransformer

    model: Any = SentenceTransformer(str(MINILM_CONFIG.locate().parent), device="cpu", local_files_only=True)
    assert model.max_seq_length == 256
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Normalize"]

    def encode(items: Sequence[Item]) -> Tensor:
        vectors: Tensor = model.encode(list(items), batch_size=BATCH, show_progress_bar=False, convert_to_tensor=True)
        return vectors

    return encode


def text_rows() -> list[list[str]]:
    """MiniLM."""
    peer = f"sentence-transformers, batches of {BATCH}"
    timed = alternate({"starter:text": bridgekit("starter:text"), peer: sentence_transformers()}, docstrings(TEXTS))
    return [row(f"{TEXTS:,} docstrings", "starter:text", timed["starter:text"], peer, timed[peer])]


# ---- images


def photographs(folder: Path, count: int) -> list[Path]:
    """JPEGs of 1,200 x 900 pixels: crops of scikit-learn's two photographs, scaled up."""
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    draw = random.Random(0)
    paths = []
    for number in range(count):
        photo = photos[number % len(photos)]
        width = draw.randint(photo.width // 2, photo.height * 4 // 3)
        height = width * 3 // 4
        left, top = draw.randint(0, photo.width - width), draw.randint(0, photo.height - height)
        part = photo.crop((left, top, left + width, top + height)).resize((1_200, 900), Image.Resampling.BICUBIC)
        paths.append(folder / f"{number}.jpg")
        part.save(paths[-1], quality=90)
    return paths


class Pictures(torch.utils.data.Dataset[Tensor]):
    """Files through timm's transform, one at a time."""

    def __init__(self, paths: Sequence[Item], transform: Callable[[Image.Image], Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.paths[index]) as picture:
            return self.transform(picture.convert("RGB"))


def timm_loop(workers: int) -> Encode:
    """EfficientNet-Lite0 by timm as in its documentation: float32, timm's own transform, batches in order.

    Arguments:
        workers: processes that decode; 0 decodes between the batches.
    """
    import timm
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    model: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0)
    stored = torch.load(EFFICIENTNET_WEIGHTS.locate(), weights_only=True)
    # The file has timm's tensors in timm's order under other names, the classifier's two last.
    model.load_state_dict(dict(zip(model.state_dict(), stored.values(), strict=False)))
    model.eval()
    transform = create_transform(**resolve_model_data_config(model))

    @torch.inference_mode()
    def encode(items: Sequence[Item]) -> Tensor:
        loader = torch.utils.data.DataLoader(Pictures(items, transform), BATCH, num_workers=workers)
        return torch.cat([model(batch) for batch in loader])

    return encode


def image_rows() -> list[list[str]]:
    """EfficientNet-Lite0."""
    loop, loader = f"timm, batches of {BATCH}", f"timm, batches of {BATCH}, DataLoader with {os.cpu_count()} workers"
    sides = {"starter:image": bridgekit("starter:image"), loop: timm_loop(0), loader: timm_loop(os.cpu_count() or 1)}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        drawn = [Path(item) for item in read_pairs("starter:openmoji", ["image"]).columns["image"][:PICTURES] if item]
        kinds = {
            f"{len(drawn)} OpenMoji PNGs, 224 x 224": drawn,
            f"{PHOTOGRAPHS} JPEGs, 1,200 x 900": photographs(Path(folder), PHOTOGRAPHS),
        }
        for kind, paths in kinds.items():
            timed = alternate(sides, paths)
            rows += [row(kind, "starter:image", timed["starter:image"], peer, timed[peer]) for peer in (loop, loader)]
    return rows


# ---- audio


def ctranslate2_whisper(folder: Path) -> Any:
    """Whisper base as faster-whisper opens it on a CPU, from the same two packages: int8, all cores."""
    import ctranslate2

    with (folder / "model.bin").open("wb") as model:
        for part in WHISPER_PARTS:
            model.write(part.read())
    for name in ("config.json", "vocabulary.txt"):
        shutil.copy(WHISPER_PARTS[0].locate().with_name(name), folder)
    return ctranslate2.models.Whisper(str(folder), device="cpu", compute_type="int8", intra_threads=os.cpu_count() or 1)


def faster_whisper(model: Any, batch: int, padding: Padding) -> Encode:
    """Whisper's encoder with faster-whisper's preprocessing; mean of the last state over a clip's own frames.

    Arguments:
        model: from `ctranslate2_whisper`.
        batch: clips per forward pass.
        padding: `zeros`: pad the spectrogram to 30 s, as faster-whisper does; `silence`: pad the audio to 30 s, as in
            Whisper's training; `none`: pad only to the longest clip of the batch.
    """
    import ctranslate2
    from faster_whisper.audio import decode_audio, pad_or_trim
    from faster_whisper.feature_extractor import FeatureExtractor

    extract = FeatureExtractor()

    def spectrogram(wave: Any) -> Any:
        if padding == "zeros":
            return pad_or_trim(extract(wave))
        return extract(wave if padding == "none" else np.pad(wave, (0, extract.n_samples - len(wave))), padding=0)

    def encode(items: Sequence[Item]) -> Tensor:
        means = []
        for start in range(0, len(items), batch):
            waves = [decode_audio(str(item)) for item in items[start : start + batch]]
            mels = [spectrogram(wave) for wave in waves]
            longest = max(mel.shape[1] for mel in mels)
            together = np.ascontiguousarray(np.stack([pad_or_trim(mel, longest) for mel in mels]))
            states = np.asarray(model.encode(ctranslate2.StorageView.from_array(together)))
            means += [state[: -(-len(wave) // FRAME)].mean(0) for state, wave in zip(states, waves, strict=True)]
        return torch.from_numpy(np.stack(means))

    return encode


def audio_rows() -> list[list[str]]:
    """Whisper base."""
    clips = sorted((ESC10 / "clips").iterdir())
    clips = clips[:: len(clips) // CLIPS][:CLIPS]
    with tempfile.TemporaryDirectory() as folder:
        model = ctranslate2_whisper(Path(folder))
        batches = (1, 8)
        trial = alternate({str(batch): faster_whisper(model, batch, "zeros") for batch in batches}, clips[:8], 1)
        best = min(batches, key=lambda batch: min(trial[str(batch)].seconds))
        own, whole = "starter:speech", "starter:speech-30s"
        peer, short = f"faster-whisper, int8, 30 s, batch {best}", "CTranslate2, int8, own length, batch 8"
        sides = {
            own: bridgekit(own),
            peer: faster_whisper(model, best, "zeros"),
            whole: bridgekit(whole),
            short: faster_whisper(model, 8, "none"),
        }
        timed = alternate(sides, clips)
        silent = "CTranslate2, int8, 30 s of silence"
        timed[silent] = Timed((), faster_whisper(model, 8, "silence")(clips))
    pairs = ((own, peer), (own, short), (whole, peer), (whole, silent))
    return [row(f"{len(clips)} clips of 5 s", name, timed[name], other, timed[other]) for name, other in pairs]


def main() -> str:
    """Encode everything with bridgekit and its peers; return the table."""
    rows, missing = [], []
    for peer, measure in (("sentence_transformers", text_rows), ("timm", image_rows), ("faster_whisper", audio_rows)):
        if not find_spec(peer):
            missing.append(f'Not measured: {peer} is not installed (`pip install -e ".[bench]"`).')
        elif measure is audio_rows and not ESC10.is_dir():
            missing.append(f"Not measured: the recordings are not in {ESC10}.")
        else:
            rows += measure()
    head = ["items", "bridgekit", "items/s", "peer", "items/s", "ratio", "cosine: min, mean", "centred: min, mean"]
    notes = (
        "Loading a model is not timed; hashing, decoding and writing the cache are. Bridgekit and the peer alternate over "
        f"{ROUNDS} rounds: medians, and the minimum and maximum of the rounds' ratios. Cosines are between the two vectors of "
        "an item, raw and after subtracting the mean of the peer's vectors; for starter:speech and starter:image, "
        "over their last layer's part. "
        "faster-whisper pads spectrograms to 30 s with zeros, which is not silence. The rows for CTranslate2, its engine, "
        "show its vectors with silence, as Whisper was trained, and its speed at each clip's own length."
    )
    return "\n\n".join([notes, table(head, rows), *missing])


if __name__ == "__main__":
    print(main())
