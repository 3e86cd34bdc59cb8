"""Trains the bridge that comes with the starter: python hearing.py --work /tmp/sounds --esc10 /path/to/esc10

WORK is the folder of fetch_sounds.py and vary_sounds.py. Audio is aligned with text on sounds, their variants, ESC-10 and
spoken names, in closed form: training by FuseMix from there made sounds of other packages worse. Images are then bound to it
by FuseMix. First, whole packages, kinds, two voices and one fold of ESC-10 are left out, and how they are heard is printed;
`--test` stops there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile
import torch
from bridgekit_starter.openmoji import EVERYDAY_SOURCE, SOURCE
from bridgekit_starter.spoken import HELD_OUT_VOICES, TRAINING_VOICES
from bridgekit_starter.spoken import build as spoken_names
from fetch_sounds import read_table
from safetensors.torch import load, save
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import cross_entropy

from bridgekit import Bridge, bind
from bridgekit.bridge.bridge import Side
from bridgekit.bridge.provenance import installed_version
from bridgekit.diffusion.conditioner import save_conditioner
from bridgekit.diffusion.models import open_model
from bridgekit.diffusion.painter import open_painter
from bridgekit.fusion.adapter import Adapter, FrozenSide, FusionAdapter, project
from bridgekit.fusion.closed_form import ClosedForm
from bridgekit.fusion.training import PRESETS
from bridgekit.latents.encode import encode_items
from bridgekit.plugins import load_encoder
from bridgekit.tables.seen import TrainingRows

HERE = Path(__file__).parent
SEED = 0
#: Of the linear adapter for images, which is trained. The temperature is fitted on held-out clips, see `test`.
PRESET = replace(PRESETS["default"], blocks=0)
#: Added to each covariance, in units of its mean eigenvalue.
RIDGE = 0.1
#: Rows of a kind grow with the square root of its number of sounds, and equal it here.
ROWS = 300
#: How often each spoken name is a row.
SPOKEN = 8
#: Packages that `--test` leaves out, chosen before any result: by different people, none the only source of a kind.
HELD_OUT = ("openttd-opensfx", "luanti-game-minetest", "fluid-soundfont-gs", "simutrans-pak64")
#: Candidates for the temperature.
TEMPERATURES = tuple(0.005 * step for step in range(1, 20))
#: Kinds that `--test` leaves out everywhere, to see whether the bridge knows that it does not know them.
UNKNOWN = (
    "bagpipes", "camera", "cash register", "elevator", "fan", "heartbeat", "keyboard typing", "laser", "printer", "shower",
    "snake", "sword", "toilet", "whip", "xylophone",
)  # fmt: skip
#: ESC-10's labels: kind, and captions besides those of kinds.csv.
ESC10 = {
    "dog bark": ("dog", "a dog barks|a barking dog"),
    "rain": ("rain", "rain falls|it is raining"),
    "sea waves": ("sea", "sea waves|waves on the shore"),
    "baby cry": ("crying baby", "a baby cries|a crying baby"),
    "clock tick": ("clock", "a clock ticks|a ticking clock"),
    "person sneeze": ("sneeze", "a person sneezes|someone sneezes"),
    "helicopter": ("helicopter", "a helicopter|a helicopter flies past"),
    "chainsaw": ("chainsaw", "a chainsaw|a chainsaw cuts wood"),
    "rooster": ("rooster", "a rooster crows|a cock crows"),
    "fire crackling": ("fire", "a crackling fire|fire crackles"),
}


@dataclass(frozen=True)
class Sound:
    """A clip with its captions, its kind, and where it comes from: a package, or a fold of ESC-10."""

    clip: Path
    captions: tuple[str, ...]
    kind: str
    source: str


def sounds(work: Path, esc10: Path) -> list[Sound]:
    """All sounds and their variants, and the clips of ESC-10."""
    kinds = {row["kind"]: row for row in read_table(HERE / "kinds.csv")}
    captions: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
    for row in (*read_table(work / "pairs.csv"), *read_table(work / "varied.csv")):
        captions[row["audio"], row["kind"], row["package"]].append(row["text"])

    def pictures(kind: str) -> list[str]:
        return [name for name in kinds[kind]["pictures"].split("|") if name]

    found = [
        Sound(work / clip, (*texts, *pictures(kind)), kinds[kind]["sound"], package)
        for (clip, kind, package), texts in captions.items()
    ]
    for row in read_table(esc10 / "clips.csv"):
        kind, texts = ESC10[row["label"]]
        found.append(
            Sound(esc10 / row["audio"], (*texts.split("|"), *pictures(kind)), kinds[kind]["sound"], f"esc10-{row['fold']}")
        )
    return found


def spoken_by(voices: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Clips of names in these voices, and the names."""
    pairs = spoken_names()
    rows = zip(pairs.columns["audio"], pairs.columns["text"], strict=True)
    found = [(Path(str(clip)), str(name)) for clip, name in rows if Path(str(clip)).parent.name in voices]
    return [clip for clip, _ in found], [name for _, name in found]


def table(chosen: Sequence[Sound], voices: Sequence[str]) -> list[tuple[Path, str]]:
    """Clips and captions: as many of each kind as `ROWS` says, and `SPOKEN` times the names spoken by these voices."""
    draw = random.Random(SEED)
    of_kind: defaultdict[str, list[tuple[Path, str]]] = defaultdict(list)
    for sound in chosen:
        of_kind[sound.kind] += [(sound.clip, caption) for caption in sound.captions]
    rows: list[tuple[Path, str]] = []
    for _, own in sorted(of_kind.items()):
        times, more = divmod(round((len(own) * ROWS) ** 0.5), len(own))
        rows += own * times + draw.sample(own, more)
    return rows + list(zip(*spoken_by(voices), strict=True)) * SPOKEN


def train(chosen: Sequence[Sound], voices: Sequence[str]) -> Bridge:
    """A bridge of audio and text, whose space is the text encoder's own, in closed form.

    A canonical correlation analysis of the rows (bridgekit.fusion.closed_form) gives linear maps of both into a common space.
    The text side is then taken back to the text encoder's latents, by the linear map for which their products with a clip's
    vector are nearest to the similarities in that space, over all captions.
    """
    encoders = {modality: load_encoder(f"starter:{modality}", "cpu") for modality in ("audio", "text")}
    rows = table(chosen, voices)
    items: dict[str, list[Path | str]] = {
        modality: list(dict.fromkeys(row[side] for row in rows)) for side, modality in enumerate(encoders)
    }
    latents = {}
    for modality, encoder in encoders.items():
        found = encode_items(encoder, items[modality])
        latents[modality] = found.matrix[torch.from_numpy(found.ids)].float()
    places = {modality: {item: place for place, item in enumerate(own)} for modality, own in items.items()}
    index = {modality: torch.tensor([places[modality][row[side]] for row in rows]) for side, modality in enumerate(encoders)}
    dim = encoders["text"].dim
    maps = {modality: FusionAdapter(own.shape[1], dim, 0, 1.0, 0.0).eval() for modality, own in latents.items()}
    for modality, adapter in maps.items():
        adapter.standardise(latents[modality])
    ClosedForm(maps, latents, index).set_adapters(RIDGE)
    with torch.no_grad():
        texts, similar = FrozenSide(dim), project(maps["text"], latents["text"])
        own = project(texts, latents["text"])
        own, similar = own - own.mean(0), similar - similar.mean(0)
        gram = own.T @ own
        back = torch.linalg.solve(gram + 1e-3 * gram.diagonal().mean() * torch.eye(dim), own.T @ similar)
        head = maps["audio"].head
        scale = 1 / (back @ head.weight).std()  # the length does not matter, half precision does
        head.weight.copy_(scale * back @ head.weight)
        head.bias.copy_(scale * back @ head.bias)
    adapters: dict[str, Adapter] = {"audio": maps["audio"], "text": texts}
    sides = {
        modality: Side(f"starter:{modality}", encoder.revision, encoder.dim, modality == "text")
        for modality, encoder in encoders.items()
    }
    means = {modality: project(adapters[modality], latents[modality]).mean(0) for modality in sides}
    return Bridge(sides, adapters, PRESET, PRESET.temperature, {"seed": SEED, "rows": {"train": len(rows)}}, means=means)


def prompts(chosen: Sequence[Sound], kinds: Iterable[str]) -> dict[str, str]:
    """The most frequent caption of each kind."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for sound in chosen:
        counts[sound.kind].update(sound.captions[:1])
    return {kind: counts[kind].most_common(1)[0][0] for kind in kinds}


def originals(chosen: Iterable[Sound]) -> list[Sound]:
    """Those that are no variants."""
    return [sound for sound in chosen if sound.clip.parent.name != "varied"]


def report(bridge: Bridge, learned: Sequence[Sound], asked: Sequence[Sound], names: str) -> None:
    """Print how often the right caption is the first, or among the first three, of all kinds'."""
    kinds = sorted({sound.kind for sound in learned})
    among = bridge.embed("text", list(prompts(learned, kinds).values()))
    asked = [sound for sound in asked if sound.kind in kinds]
    similarity = bridge.embed("audio", [sound.clip for sound in asked]) @ among.T
    right = torch.tensor([kinds.index(sound.kind) for sound in asked])
    order = similarity.argsort(1, descending=True)
    first, third = ((order[:, :k] == right[:, None]).any(1).float() for k in (1, 3))
    by_kind = torch.stack([third[right == kind].mean() for kind in sorted(set(right.tolist()))])
    print(
        f"{names}: {len(asked)} sounds of {len(by_kind)} kinds among {len(kinds)}: the right caption is first for "
        f"{100 * first.mean():.1f} %, among 3 for {100 * third.mean():.1f} % (mean over kinds {100 * by_kind.mean():.1f} %)",
        flush=True,
    )


def noises(folder: Path) -> list[Path]:
    """Clips of what is no sound of anything: coloured noise, tones, and near silence."""
    folder.mkdir(parents=True, exist_ok=True)
    random_ = np.random.default_rng(SEED)
    files = []
    for number in range(60):
        t = np.arange(3 * 16_000) / 16_000
        spectrum = np.fft.rfft(random_.standard_normal(len(t))) / np.maximum(np.arange(len(t) // 2 + 1), 1) ** (number % 5 / 4)
        wave = np.fft.irfft(spectrum, len(t)) if number % 3 else np.sin(2 * np.pi * random_.uniform(60, 4_000) * t)
        files.append(folder / f"{number}.flac")
        soundfile.write(files[-1], wave / np.abs(wave).max() * 10 ** -random_.uniform(0.1, 3), 16_000)
    return files


def learn_speech(bridge: Bridge, spoken: Sequence[Path], others: Sequence[Path]) -> Tensor:
    """Weights and bias of the classifier: (dim + 1,)."""
    vectors = torch.cat([bridge.embed("audio", spoken), bridge.embed("audio", others)])
    weight = [1 / len(spoken)] * len(spoken) + [1 / len(others)] * len(others)
    labels = [1] * len(spoken) + [0] * len(others)
    model = LogisticRegression(C=1e4, max_iter=2_000).fit(vectors.numpy(), labels, weight)
    return torch.from_numpy(np.concatenate([model.coef_[0], model.intercept_])).float()


def threshold(what: str, known: Tensor, unknown: Tensor, among: Tensor) -> float:
    """The similarity to the nearest name that nine in ten of the known clips reach. Prints how many of the unknown do."""
    scores = [(vectors @ among.T).amax(1).numpy() for vectors in (known, unknown)]
    auc = roc_auc_score(np.repeat([1, 0], [len(known), len(unknown)]), np.concatenate(scores))
    least = float(np.quantile(scores[0], 0.1))
    passed = 100 * float((scores[1] >= least).mean())
    print(
        f"sure of {what}: ROC AUC {auc:.3f} ({len(known)} known, {len(unknown)} not); at {least:.3f}, 90 % of the known and "
        f"{passed:.0f} % of the others pass"
    )
    return least


def test(chosen: Sequence[Sound], work: Path) -> dict[str, float]:
    """Measure with packages, kinds, a fold of ESC-10 and voices left out. Returns the temperature and the thresholds."""
    learned = [sound for sound in chosen if sound.source not in (*HELD_OUT, "esc10-1") and sound.kind not in UNKNOWN]
    bridge = train(learned, TRAINING_VOICES)
    bridge.save(work / "test", overwrite=True)
    asked = [sound for sound in originals(chosen) if sound.source in HELD_OUT and sound.kind not in UNKNOWN]
    fold = [sound for sound in chosen if sound.source == "esc10-1"]
    report(bridge, learned, asked, "held-out packages")
    report(bridge, learned, fold, "ESC-10, fold 1")
    clips, names = spoken_by(HELD_OUT_VOICES)
    spoken = bridge.embed("audio", clips)
    gallery = [str(name) for name in EVERYDAY_SOURCE.build().columns["text"]]
    among = bridge.embed("text", gallery)
    for title, candidates in (("all names", sorted({*names, *gallery})), ("everyday names", gallery)):
        rows = [row for row, name in enumerate(names) if name in candidates]
        similarity = spoken[rows] @ bridge.embed("text", candidates).T
        right = torch.tensor([candidates.index(names[row]) for row in rows])
        order = similarity.argsort(1, descending=True)
        first, ten = (100 * float((order[:, :k] == right[:, None]).any(1).float().mean()) for k in (1, 10))
        print(f"held-out voices: {len(rows)} clips among {len(candidates)} {title}: recall@1 {first:.1f} %, @10 {ten:.1f} %")
    # `similarity` and `right` are now those of everyday names.
    temperature = min(TEMPERATURES, key=lambda each: float(cross_entropy(similarity / each, right)))

    others = [sound.clip for sound in originals(chosen) if sound.kind in UNKNOWN]
    known = bridge.embed("audio", [sound.clip for sound in (*asked, *fold)])
    sure = threshold("sounds", known, bridge.embed("audio", [*others, *noises(work / "noises")]), among)
    strange = [row for row, name in enumerate(names) if name not in gallery]
    said = [row for row, name in enumerate(names) if name in gallery]
    sure_speech = threshold("spoken names", spoken[said], spoken[strange], among)
    speech = learn_speech(bridge, spoken_by(TRAINING_VOICES)[0][::4], [sound.clip for sound in originals(learned)])
    vectors = torch.cat([spoken, bridge.embed("audio", [sound.clip for sound in asked])])
    scored = (vectors @ speech[:-1] + speech[-1]).numpy()
    labels = np.repeat([1, 0], [len(spoken), len(asked)])
    speech_auc = float(roc_auc_score(labels, scored))
    share = 100 * float(((scored > 0) == labels).mean())
    print(f"speech: ROC AUC {speech_auc:.4f}, {share:.1f} % of {len(labels)} right", flush=True)
    return {"temperature": temperature, "audio": sure, "speech": sure_speech}


def halve(folder: Path) -> None:
    """Store a bridge's adapters in half precision."""
    file, about = folder / "adapters.safetensors", folder / "bridge.json"
    file.write_bytes(save({name: tensor.half() for name, tensor in load(file.read_bytes()).items()}, {"format": "1"}))
    metadata = json.loads(about.read_text())
    metadata["adapters_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    about.write_text(json.dumps(metadata, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    """Measure, then train on everything and write the bridge into the package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of fetch_sounds.py and vary_sounds.py")
    parser.add_argument("--esc10", type=Path, required=True, help="folder of ESC-10, with clips.csv")
    parser.add_argument("--test", action="store_true", help="measure only")
    options = parser.parse_args()
    started = time.monotonic()
    chosen = sounds(options.work, options.esc10)
    measured = test(chosen, options.work)
    if options.test:
        return
    bridge = train(chosen, (*TRAINING_VOICES, *HELD_OUT_VOICES))
    speech = learn_speech(bridge, spoken_by(TRAINING_VOICES)[0][::4], [sound.clip for sound in originals(chosen)])
    finish(replace(bridge, speech=speech), measured, options.work)
    print(f"{time.monotonic() - started:.0f} s")


def finish(bridge: Bridge, measured: Mapping[str, float], work: Path) -> None:
    """Bind images to a bridge of audio and text, and write it into the package."""
    bound = bind(bridge.save(work / "hearing", overwrite=True), "image", SOURCE.name, seed=SEED, overwrite=True)
    provenance = {
        **bound.provenance,
        # What it searches: the sounds themselves are not here.
        "pairs": EVERYDAY_SOURCE.name,
        "modalities": ["image", "text"],
        "trained_on": "sounds of Debian packages (training/SOUNDS.md), ESC-10, and names spoken by eSpeak NG",
        "command": "python hearing.py",
        "bridgekit": installed_version(),
        "sure": {kind: round(measured[kind], 4) for kind in ("audio", "speech")},
    }
    whole = replace(bound, provenance=provenance, temperature=measured["temperature"], training_rows=TrainingRows())
    folder = HERE.parent / "bridgekit_starter" / "hearing"
    card = (folder / "README.md").read_text(encoding="utf-8")
    halve(whole.save(folder, overwrite=True))
    (folder / "README.md").write_text(card, encoding="utf-8")
    conditioner = open_painter(Bridge.load(folder, "cpu"), open_model("starter:openmoji-64", "cpu"), folder).conditioner
    [file] = folder.glob("conditioners/*")
    save_conditioner(replace(conditioner, embeddings=conditioner.embeddings.half()), file)
    size = sum(file.stat().st_size for file in folder.rglob("*.*")) / 1e6
    print(f"{folder}: {size:.1f} MB")


if __name__ == "__main__":
    main()
