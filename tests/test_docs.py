"""The documents hold: the site builds, its links lead somewhere, and its commands run or say what they need.

python -m tests.test_docs    # runs the commands, and prints what comes out under each
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import typer.main

import bridgekit
from bridgekit import cli
from bridgekit.diffusion.conditioner import Fit, fit_conditioner
from bridgekit.plugins import forget_plugins
from tests.test_tutorial import PROGRESS, TUTORIAL, Sandbox, first_difference

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
#: Written elsewhere, or run by a test of its own.
NOT_RUN_HERE = {TUTORIAL}
#: What stands in the pages for the folder that their commands are run in.
HOME = "/home/you/words"
_BLOCK = re.compile(r"(?:^\*Needs: ([^\n]+)\*\n\n)?^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, with what the line above it says that it needs."""

    language: str
    content: str
    needs: str | None

    @property
    def commands(self) -> list[tuple[str, list[str]]]:
        """Each command, and the lines that the page shows below it."""
        joined = re.sub(r"\\\n *", "", self.content)
        parts = re.split(r"^\$ ", joined, flags=re.MULTILINE)[1:] if self.language == "console" else []
        return [(lines[0], lines[1:]) for lines in map(str.splitlines, parts)]

    @property
    def file(self) -> str | None:
        """The file that the block is to be saved as, which its first line names."""
        named = re.match(r"# ([\w./-]+\.\w+)\n", self.content)
        return named[1] if named and self.language in ("python", "toml") else None


def blocks(text: str) -> list[Block]:
    return [Block(language, content, needs or None) for needs, language, content in _BLOCK.findall(text)]


def pages() -> list[Path]:
    """The pages of docs/, in the order of the navigation."""
    named = re.findall(r": ([\w./-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    return [DOCS / name for name in named if (DOCS / name).exists()]


# ---- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as strictly as can be, where no network can be reached."""
    pytest.importorskip("material", reason="the site needs the extra `docs`: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Seen(HTMLParser):
    """What a built page loads, where it links to, and where can be linked to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self.links += [given["href"]] if tag == "a" and "href" in given else []
        self.loads += [given[name] for name in ("src", "data", "poster") if name in given]
        self.loads += [given["href"]] if tag in ("link", "use", "image") and given.get("rel") != "canonical" else []
        self.loads += [part.split()[0] for part in given.get("srcset", "").split(",") if part.strip()]
        self.loads += _urls(given.get("style", ""))

    def handle_data(self, data: str) -> None:
        self.loads += _urls(data) if self.lasttag == "style" else []


def _urls(css: str) -> list[str]:
    return re.findall(r"(?:url\(|@import )[\"']?([^\"')]+)", css)


def built(site: Path) -> dict[Path, Seen]:
    """The site's pages, but for the one that a server shows where there is none: its links are from the server's root."""
    return {page.resolve(): Seen(page.read_text(encoding="utf-8")) for page in site.rglob("*.html") if page.name != "404.html"}


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = built(site)
    assert len(pages) > 20
    loaded = [(page, url) for page, seen in pages.items() for url in seen.loads]
    loaded += [(file, url) for file in site.rglob("*.css") for url in _urls(file.read_text(encoding="utf-8"))]
    assert len(loaded) > 100
    for file, url in loaded:
        parts = urlsplit(url)
        where = f"{file.relative_to(site)} loads {url}"
        assert parts.scheme in ("", "data"), where
        assert not parts.netloc, where
        assert parts.scheme or not parts.path or (file.parent / unquote(parts.path)).is_file(), where


def test_every_link_within_the_site_leads_to_a_page_and_a_place_on_it(site: Path) -> None:
    pages = built(site)
    followed = 0
    for page, seen in pages.items():
        for link in seen.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert target.is_file(), f"{page.name} links to {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].anchors, f"{page.name} links to {link}"
            followed += 1
    assert followed > 500


def test_links_in_a_checkout_lead_to_files() -> None:
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *pages(), *ROOT.glob("plugins/*/README.md")]
    for document in documents:
        prose = _BLOCK.sub("", document.read_text(encoding="utf-8"))
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose):
            if not urlsplit(target).scheme:
                assert (document.parent / target).exists(), f"{document.relative_to(ROOT)} links to {target}"


def test_every_public_name_and_every_option_is_in_the_reference(site: Path) -> None:
    told = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    for name in bridgekit.__all__:
        assert f"::: bridgekit.{name}\n" in told, f"add `::: bridgekit.{name}` to docs/reference/python.md"
    anchors = Seen((site / "reference" / "python.html").read_text(encoding="utf-8")).anchors
    assert {"bridgekit.align", "bridgekit.Bridge.search", "bridgekit.BridgekitError"} <= anchors
    page = (site / "reference" / "command-line.html").read_text(encoding="utf-8")
    for name, verb in verbs():
        assert name in page
        for option in [name for parameter in verb.params for name in parameter.opts if name.startswith("-")]:
            assert option in page, f"{name} {option}"


def test_search_works_from_disk_in_a_browser_that_asks_nobody(site: Path, tmp_path: Path) -> None:
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = Path("/usr/bin/chromium")
    if not chromium.exists():
        pytest.skip("there is no /usr/bin/chromium to open the site with")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    quiet += ["--disable-component-update", "--disable-sync"]
    with sync.sync_playwright() as started:
        browser = started.chromium.launch_persistent_context(str(tmp_path), executable_path=str(chromium), args=quiet)
        page = browser.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto((site / "index.html").as_uri())
        # Its script listens for keys, not for what is in the field, and only once it has run.
        page.locator("html.js").wait_for(timeout=60_000)
        page.locator(".md-search__input").press_sequentially("recall@k among")
        found = page.locator(".md-search-result__link", has_text="Evaluation done right").first
        found.wait_for(timeout=60_000)
        browser.close()
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:", "about:"))] == []


# ---- the commands


def verbs() -> Iterator[tuple[str, typer.core.TyperCommand]]:
    """Every verb and sub-verb, by its whole name."""
    for name, verb in _program().commands.items():
        yield f"bridgekit {name}", verb
        for inner, command in getattr(verb, "commands", {}).items():
            yield f"bridgekit {name} {inner}", command


@functools.cache
def _program() -> Any:
    """The command line, with what plugins add to it."""
    return typer.main.get_command(cli.program())


def complaint(command: str, *, whole: bool = True) -> str | None:
    """What the real command line says against a line that calls it, or None. One that is not whole may lack arguments."""
    words = shlex.split(command, comments=True)
    start = next((at for at, word in enumerate(words) if word.rpartition("/")[2] == "bridgekit"), None)
    if start is None:
        return None
    end = next((at for at, word in enumerate(words) if at > start and re.fullmatch(r"&&|[|;]|[12]?>+", word)), len(words))
    given = [word for word in words[start + 1 : end] if word not in ("-h", "--help", "--version", "--debug")]
    verb = _program()
    while hasattr(verb, "commands") and given and not given[0].startswith("-"):
        if given[0].isupper() and not whole:
            return None  # `bridgekit VERB --help`
        if given[0] not in verb.commands:
            return f"there is no verb {given[0]!r}"
        verb = verb.commands[given.pop(0)]
    if not given and hasattr(verb, "commands"):
        return None
    try:
        verb.make_context(verb.name, given)
    except Exception as error:  # the classes are click's, or, in newer versions of typer, its own
        if not whole and type(error).__name__ in ("MissingParameter", "BadOptionUsage"):  # the latter: no value for an option
            return None
        return str(error.format_message() if hasattr(error, "format_message") else error)
    return None


def test_a_wrong_verb_or_option_is_noticed() -> None:
    assert complaint("bridgekit align --a audio --b text --pairs clips.csv") is None
    assert complaint("HF_HUB_OFFLINE=1 bridgekit eval bridges/x --split test > found.txt") is None
    assert complaint("torchrun --nproc-per-node 2 -m bridgekit align --pairs clips.csv  # don't wait") is None
    assert complaint("bridgekit plugins new demo && bridgekit plugins --json") is None
    assert "verb" in str(complaint("bridgekit allign --pairs clips.csv"))
    assert "verb" in str(complaint("../bin/bridgekit plugins newer demo"))
    assert "--pears" in str(complaint("bridgekit align --pears clips.csv"))
    assert "--pears" in str(complaint("bridgekit align --pears clips.csv", whole=False))
    assert "-k" in str(complaint("bridgekit search dog.wav -k many"))
    assert complaint("bridgekit bind bridges/x")
    assert complaint("bridgekit bind bridges/x", whole=False) is None
    assert complaint("bridgekit eval --pairs")
    assert complaint("bridgekit eval --pairs", whole=False) is None
    assert complaint("bridgekit VERB --help", whole=False) is None


def test_the_command_line_takes_every_command_in_the_documents() -> None:
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md"), *ROOT.glob("plugins/*/README.md")]
    checked = 0
    for document in documents:
        text = document.read_text(encoding="utf-8")
        lines = [command for block in blocks(text) for command, _ in block.commands]
        prose = _BLOCK.sub("", text)
        lines += [line.strip().removeprefix("$ ") for line in prose.splitlines() if re.match(r"    .*\bbridgekit ", line)]
        spans = [span.replace("\n", " ") for span in re.findall(r"(?<!`)`(bridgekit [^`]+)`", prose)]
        for line, whole in [*((line, True) for line in lines), *((span, False) for span in spans)]:
            wrong = complaint(line, whole=whole)
            assert wrong is None, f"{document.relative_to(ROOT)}: {line}\n{wrong}"
            checked += "bridgekit" in line
    for name, verb in verbs():
        for example in re.findall(r"\[b\](bridgekit .*?)\[/b\]", verb.help or ""):
            assert complaint(example) is None, name
            checked += 1
    assert checked > 100


def test_every_command_is_run_or_says_what_it_needs() -> None:
    """By their form: commands stand in console blocks, and a file that they use stands before them with its name on top."""
    for page in set(pages()) - NOT_RUN_HERE:
        text = page.read_text(encoding="utf-8")
        for block in blocks(text):
            where = f"{page.relative_to(ROOT)}: {block.content.splitlines()[0]}"
            if block.language == "console":
                assert block.commands, f"{where}: a console block without a line that begins with $"
                assert block.content.startswith("$ "), where
            else:
                assert block.needs or block.file or block.language == "text", f"{where}: what is this block for?"
        rest = re.sub(r"^```console$.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        stray = re.search(r"^ *(\$|bridgekit|torchrun|pip|python) .*", rest, re.MULTILINE)
        assert not stray, f"{page.name}: a command outside a console block: {stray and stray[0]}"


class Reader(Sandbox):
    """Someone who types the commands of the pages. Bridgekit and Python run in this process, which has torch already."""

    def run(self, command: str) -> tuple[int, list[str]]:
        words = shlex.split(command)
        if words[0] != "bridgekit" and (words[0] != "python" or len(words) != 2):
            return super().run(command)
        output, code = io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            patch.chdir(self.folder)
            patch.setattr(sys, "argv", words if words[0] == "bridgekit" else words[1:])
            patch.setattr(sys, "path", [*sys.path, *map(str, self.folder.parent.glob("venv/lib/python*/site-packages"))])
            for name in ("COLUMNS", "BRIDGEKIT_HOME", "HF_HUB_OFFLINE"):
                patch.setenv(name, self.environment[name])
            forget_plugins()
            try:
                cli.main() if words[0] == "bridgekit" else runpy.run_path(words[1], run_name="__main__")
            except SystemExit as stop:
                code = int(stop.code or 0)
        lines = [line.rstrip().replace(str(self.folder), self.home) for line in output.getvalue().splitlines()]
        return code, [line for line in lines if not PROGRESS.fullmatch(line)]


def walk(reader: Reader) -> Iterator[tuple[Path, str, list[str], int, list[str]]]:
    """Do as the pages say: save files, type commands. Gives page, command, the lines shown, exit code and the lines seen."""
    for page in pages():
        for block in blocks(page.read_text(encoding="utf-8")) if page not in NOT_RUN_HERE else ():
            if block.needs:
                continue
            if block.file:
                path = reader.folder / block.file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.content, encoding="utf-8")
            for command, shown in block.commands:
                yield page, command, shown, *reader.run(command)


def _heard_first(lines: Sequence[str]) -> list[str]:
    """Without the second and third thing heard, which may differ between versions of torch."""
    return [re.sub(r"(: heard [^,]+),.*", r"\1", line) for line in lines]


@pytest.mark.skipif(os.name == "nt", reason="the commands are those of a Unix shell")
def test_the_pages_commands_run_in_their_order_and_print_what_the_pages_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bridgekit_starter", reason="the pages use the starter's encoders")
    monkeypatch.setitem(fit_conditioner.__kwdefaults__ or {}, "fit", Fit(steps=200))  # enough for twelve captions
    reader = Reader(tmp_path, HOME)
    reader.environment["LC_ALL"] = "C"
    ran = set()
    try:
        for page, command, shown, code, seen in walk(reader):
            assert code == 0, "\n".join([f"{page.name}: {command}", *seen])
            difference = first_difference(_heard_first(shown), _heard_first(seen), {})
            assert not difference, "\n".join([f"{page.name}: {command}", *seen, "", f"where the page has: {difference}"])
            ran.add(page.name)
    finally:
        forget_plugins()
    assert {"tutorial.md", "own-data.md", "evaluation.md", "own-encoder.md"} <= ran
    assert (reader.folder / "pictures" / "sheet.png").stat().st_size > 10_000


def print_outputs(folder: Path) -> None:
    """Run the pages' commands in a new folder, and print what comes out, with the processor time that it took."""
    folder.mkdir(parents=True)
    reader, since = Reader(folder, HOME), sum(os.times()[:4])
    reader.environment["LC_ALL"] = "C"
    for page, command, shown, code, seen in walk(reader):
        now = sum(os.times()[:4])
        print(f"\n[{page.name}, {now - since:.1f} s] $ {command}", *seen, sep="\n")
        difference = first_difference(_heard_first(shown), _heard_first(seen), {})
        print(f"[exit code {code}]" if code else "", f"[differs: {difference}]" if difference else "")
        since = now


if __name__ == "__main__":
    print_outputs(Path(sys.argv[1]))
