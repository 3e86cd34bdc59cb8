"""No text of a stranger's is obeyed by the terminal: what is printed, on a real one, and that nothing else prints."""

from __future__ import annotations

import ast
import os
import pty
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from bridgekit import cli, progress, terminal
from tests.conftest import Run, tone
from tests.shared import Fork
from tests.test_bridge import untrained
from tests.toys import tone_table

ROOT = Path(__file__).resolve().parents[1]
#: Writes the clipboard, clears the screen, sets the title, reverses what follows, and is markup of rich's.
EVIL = "\x1b]52;c;b3duZWQ=\x07\x1b[2J\x9b2J\u202egnp\u2066\u200f te[/red]st[bold]:smile:"
SHOWN = "\\x1b]52;c;b3duZWQ=\\x07\\x1b[2J\\x9b2J\\u202egnp\\u2066\\u200f te[/red]st[bold]:smile:"
#: What rich itself sends: styles, and the moves of the cursor that redraw a progress bar.
RICH = re.compile(r"\x1b\[(\d+;)*\d*[mAKG]|\x1b\[\?25[lh]")


def on_terminal(work: Callable[[], object]) -> str:
    """What a forked process prints on a terminal of its own, 4,000 columns wide, without rich's sequences."""
    master, slave = pty.openpty()

    def run() -> None:
        os.environ |= {"COLUMNS": "4000", "TERM": "xterm-256color"}
        work()

    child = Fork(run, Path(os.ttyname(slave)))
    os.close(slave)
    printed = bytearray()
    try:
        while part := os.read(master, 1 << 16):
            printed += part
    except OSError:
        pass  # the child has ended
    os.close(master)
    code = child.wait()
    text = printed.decode()
    assert code in (0, 1, 2), text
    assert "Traceback" not in text
    return RICH.sub("", text)


def assert_safe(printed: str) -> None:
    found = re.search("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]", printed)
    assert not found, f"it prints {found[0]!a} in {printed!r}"


def bridgekit(*arguments: object) -> str:
    sys.argv = ["bridgekit", *map(str, arguments)]
    printed = on_terminal(cli.main)
    assert_safe(printed)
    return printed


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy: object) -> Path:
    """Clips of which two have the same caption, with escapes in it, in two splits, one of them named so too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    rows = tone_table(tmp_path, copies=2).read_text().splitlines()[1:]
    lines = ["audio,text,split"]
    for number, split in enumerate(("train", "val", EVIL)):
        tone(tmp_path / f"{number}.wav", 1_000 + 500 * number)
        lines.append(f'{number}.wav,"{EVIL}",{split}')
    lines += [f"{row},{'train' if number % 3 else 'test'}" for number, row in enumerate(rows)]
    Path("pairs.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path / "pairs.csv"


def test_check_on_a_terminal(table: Path) -> None:
    printed = bridgekit("check", "pairs.csv", "--no-latents")
    assert printed.count(SHOWN) >= 3, "a finding, a split, and the table of splits"


def test_search_info_and_errors_on_a_terminal(table: Path) -> None:
    untrained().save("bridge")
    assert SHOWN in bridgekit("search", "ant", "--to", "text", "--among", "pairs.csv", "--bridge", "bridge", "-k", 60)
    assert SHOWN in bridgekit("encode", "--pairs", EVIL)
    assert SHOWN in bridgekit("info", "bridge", EVIL), "usage errors are typer's"
    assert SHOWN in bridgekit(EVIL)
    bridgekit(f"--{EVIL}")
    Path("bridge").rename(EVIL.replace("/", ""))
    assert SHOWN.replace("/", "") in bridgekit("info", EVIL.replace("/", ""))


def test_progress_bars_and_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.0)

    def work() -> None:
        with progress.progress_bars() as report:
            report(EVIL, 0, 2)
            report(EVIL, 2, 2)

    printed = on_terminal(work)
    assert SHOWN in printed
    assert_safe(printed)
    work()
    assert SHOWN in capsys.readouterr().err


def test_a_traceback_of_another_library(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ValueError(EVIL)
    except ValueError as error:
        terminal.print_traceback(ValueError, error, error.__traceback__)
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback (most recent call last):\n")
    assert printed.splitlines()[-1] == f"ValueError: {SHOWN}"


def test_a_report_that_fails_on_a_strangers_text(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bridgekit.report import page

    def fails(*arguments: object) -> None:
        raise ValueError(EVIL)

    monkeypatch.setattr(page, "table_results", fails)
    bridge = untrained()
    assert page.report_or_warning(bridge, "b", None, np.array(["test"])) == {}  # type: ignore[arg-type]
    assert capsys.readouterr().err == f"bridgekit: the report could not be made: ValueError: {SHOWN}\n"


# ---- nothing else prints


#: Where printing is allowed: the one place, and the app's own three lines, which have only its own address.
PRINTERS = ("bridgekit/terminal.py", "plugins/bridgekit-app/bridgekit_app/cli.py")
#: Calls that print, or that read rich's markup.
PRINTING = re.compile(
    r"(.*\.)?(print|pprint|echo|secho|print_exc|print_exception|print_tb|print_last|from_markup|from_ansi|Console)"
    r"|(sys\.)?_{0,2}(stdout|stderr)_{0,2}(\.buffer)?\.(write|writelines)|input"
)
#: What of rich may be used elsewhere.
OF_RICH = {("rich", "progress"), ("rich.console", "RenderableType")}


def printing(code: str) -> Iterator[str]:
    """What in some code may print."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call):
            name, options = ast.unparse(node.func), {option.arg: ast.unparse(option.value) for option in node.keywords}
            if (
                PRINTING.fullmatch(name)
                or (name == "os.write" and ast.unparse(node.args[0]) in ("1", "2"))
                or (name.endswith("TextColumn") and options.get("markup") != "False")
            ):
                yield name
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "rich":
            yield from (f"{node.module}.{each.name}" for each in node.names if (node.module, each.name) not in OF_RICH)
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names if each.name.split(".")[0] == "rich")


def test_nothing_else_prints() -> None:
    sources = [
        file
        for folder in ("bridgekit", *sorted(f"plugins/{path.name}/" for path in (ROOT / "plugins").iterdir()))
        for file in sorted((ROOT / folder).rglob("*.py"))
        if not {"tests", "training", "build"} & set(file.relative_to(ROOT).parts)
    ]
    assert len(sources) > 120
    found = {
        name: calls
        for file in sources
        if (name := str(file.relative_to(ROOT))) not in PRINTERS and (calls := [*printing(file.read_text(encoding="utf-8"))])
    }
    assert found == {}


@pytest.mark.parametrize(
    "code",
    [
        "print(f'{x}')",
        "Console().print(x)",
        "console.print(x)",
        "typer.echo(x)",
        "sys.stderr.write(x)",
        "Text.from_markup(x)",
        "os.write(2, x)",
        "from rich import print",
        "traceback.print_exc()",
        "import rich",
        "progress.TextColumn('{task.description}')",
    ],
)
def test_code_that_prints_is_found(code: str) -> None:
    assert [*printing(code)]
