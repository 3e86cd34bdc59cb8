"""Small models with random weights in the hub's own layout, each built once a session."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny("bert", seed=1)`: the folder of a small model of that kind."""
    built: dict[tuple[str, int], Path] = {}

    def build(kind: str, seed: int = 0) -> Path:
        if (kind, seed) not in built:
            folder = tmp_path_factory.mktemp(f"{kind}-{seed}")
            tiny_models.build(kind, folder, seed)
            built[kind, seed] = folder
        return built[kind, seed]

    return build


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Sounds of 0.02 to 3.1 s at different rates, unlike each other."""
    folder = tmp_path_factory.mktemp("clips")
    lengths = [(0.4, 16_000), (1.3, 22_050), (3.1, 48_000), (1.1, 16_000), (0.02, 16_000)]
    return [tiny_models.write_sound(folder / f"{place}.wav", *length, place) for place, length in enumerate(lengths)]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Pictures of different shapes."""
    folder = tmp_path_factory.mktemp("pictures")
    shapes = [(64, 64), (90, 40), (40, 120), (200, 150)]
    return [tiny_models.write_picture(folder / f"{place}.png", shape, place) for place, shape in enumerate(shapes)]


@pytest.fixture(scope="session")
def not_a_file_of_the_kind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bad") / "notes.wav"
    path.write_text("not what it says")
    return path
