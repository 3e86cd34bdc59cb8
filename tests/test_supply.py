"""What is installed with bridgekit: pinned, from the packages that are meant, and nothing that is a stranger's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECTS = sorted([ROOT / "pyproject.toml", *ROOT.glob("plugins/*/pyproject.toml")])
LOCKS = {"requirements-clap.lock" if "clap" in project.parent.name else "requirements.lock" for project in PROJECTS}
#: Not pinned: its build depends on the machine.
BY_RANGE = {"torch", "torchvision"}


def requirements(project: Path) -> set[str]:
    """The names of the packages that a pyproject.toml asks for, extras and build among them."""
    lists = re.findall(r'^[\w-]+ = \[((?:[^\]"]|"[^"]*")*)\]', project.read_text(encoding="utf-8"), re.MULTILINE)
    strings = [string for found in lists for string in re.findall(r'"([^"]*)"', re.sub(r"#.*", "", found))]
    return {
        match.group(1).lower().replace("_", "-")
        for string in strings
        if (match := re.fullmatch(r"([A-Za-z][\w-]*)(\[[\w,]+\])?[<>=]=?.*", string))
    }


def test_the_reader_of_this_test_finds_requirements() -> None:
    assert {"torch", "pluggy", "ruff", "setuptools", "diffusers"} <= requirements(ROOT / "pyproject.toml")


@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.parent.name)
def test_nothing_requires_the_unrelated_pypi_package_bridgekit(project: Path) -> None:
    assert {name for name in requirements(project) if name.startswith("bridgekit")} <= {"bridgekit-core"}


@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.parent.name)
def test_every_requirement_is_pinned_in_the_lock(project: Path) -> None:
    lock = ROOT / ("requirements-clap.lock" if "clap" in project.parent.name else "requirements.lock")
    pinned = set(re.findall(r"^([\w.-]+)==", lock.read_text(encoding="utf-8"), re.MULTILINE))
    others = {"bridgekit-core", "faster-whisper", "open-clip-torch", "sentence-transformers", "setuptools"}
    assert requirements(project) - BY_RANGE - others <= pinned | {
        "protobuf",
        "sentencepiece",
    }


@pytest.mark.parametrize("lock", sorted(LOCKS))
def test_a_lock_pins_no_build_of_torch(lock: str) -> None:
    assert not re.search(r"^(torch(vision)?=|nvidia-|cuda-|triton)", (ROOT / lock).read_text(encoding="utf-8"), re.MULTILINE)


def test_torch_is_new_enough_to_read_weights_without_running_code() -> None:
    assert '"torch>=2.6"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")  # CVE-2025-32434


def test_no_message_and_no_page_sends_anyone_to_pypi_for_bridgekit() -> None:
    files = [file for folder in ("bridgekit", "plugins", "docs", "examples") for file in (ROOT / folder).rglob("*")]
    for file in [*files, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        if file.suffix in (".py", ".md", ".toml") and file.is_file():
            wrong = re.findall(r"pip install (?:[-\w=]+ )*['\"]?bridgekit(?!-core).*", file.read_text(encoding="utf-8"))
            assert not wrong, f"{file}: {wrong}"
