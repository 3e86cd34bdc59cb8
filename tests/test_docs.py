"""The documentation works: the site builds, links resolve, and commands run and print what the pages show.

python -m tests.test_docs FOLDER    # runs the commands in a new folder, prints their output, and updates numbers in the pages
"""

from __future__ import annotations

import contextlib
import csv
import functools
import importlib
import io
import os
import re
import runpy
import shlex
import site as site_module
import subprocess
import sys
import venv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import typer.main

import bridgekit
from bridgekit import cli
from bridgekit.diffusion.conditioner import Fit, fit_conditioner
from bridgekit.plugins import forget_plugins

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
#: This page's commands have a folder of their own; those of all other pages continue one another in the folder `words`.
MOTION = DOCS / "tutorial-new-modality.md"
_BLOCK = re.compile(r"(?:^\*Needs: ([^\n]+)\*\n\n)?^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_GENERATED = re.compile(r"<!-- ::: [\w. ]+ -->.*?<!-- ::: end -->", re.DOTALL)
#: Printed only where a run is slow.
PROGRESS = re.compile(r".*━━━.*|[\w' ]+: [\d,]+ of [\d,]+, .*")
#: The second and third are the ends of an interval.
_NUMBER, _ANY_NUMBER = re.compile(r"\d+\.\d+|\d+(?=–\d)|(?<=\d–)\d+"), re.compile(r"\d+(\.\d+)?")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, and what the line above it says that it needs."""

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
    def file(self) -> tuple[str, bool] | None:
        """The file that the block's first line names, and whether the block is only an excerpt of it."""
        named = re.match(r"# (from )?([\w./-]+\.\w+)\n", self.content)
        return (named[2], bool(named[1])) if named and self.language in ("python", "toml") else None


def blocks(text: str) -> list[Block]:
    return [Block(language, content, needs or None) for needs, language, content in _BLOCK.findall(_GENERATED.sub("", text))]


def pages() -> list[Path]:
    """The pages of docs/, in the order of the navigation."""
    named = re.findall(r": ([\w./-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    return [DOCS / name for name in named if (DOCS / name).exists()]


# ---- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly and without a network."""
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
    """What a built page loads, what it links to, and its anchors."""

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
    """The site's pages but 404.html, whose links start at the server's root."""
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


def test_the_reference_is_up_to_date_and_has_every_public_name_and_option() -> None:
    rewritten = runpy.run_path(str(DOCS / "make_reference.py"))["rewritten"]
    text = ""
    for page in sorted((DOCS / "reference").glob("*.md")):
        text += page.read_text(encoding="utf-8")
        assert text.endswith(rewritten(page.read_text(encoding="utf-8"))), f"{page.name}: run make reference"
    for name in bridgekit.__all__:
        assert re.search(rf"\b{name} -->|`bridgekit\.{name}`", text), (
            f"add <!-- ::: bridgekit.{name} --> to docs/reference/python.md"
        )


def test_the_reference_shows_arguments_that_a_function_takes_as_one_options_object() -> None:
    text = (DOCS / "reference" / "python.md").read_text(encoding="utf-8")
    align = text[text.index("### align") : text.index("### bind")]
    assert "    seed: int = 0,\n" in align
    assert "- `seed`: " in align
    assert "- `frozen`: " in align
    assert "AlignOptions" not in align


def test_the_guarantees_name_tests_and_attacks_that_exist() -> None:
    files = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("plugins/*/tests/*.py")]
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    lines = (DOCS / "PROMISES.md").read_text(encoding="utf-8").splitlines()
    names = re.findall(r"`([\w/.]+)`", "".join(line.split("|")[2] for line in lines if line.startswith("| ")))
    assert len(names) > 50
    for name in names:
        if name.endswith(".py"):
            assert Path(name).name in {file.name for file in files}, name
        elif "_" in name:
            assert f"def {name}(" in source, name


def test_search_works_from_disk_in_a_browser_without_a_network(site: Path, tmp_path: Path) -> None:
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = Path("/usr/bin/chromium")
    if not chromium.exists():
        pytest.skip("there is no /usr/bin/chromium to open the site with")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    quiet += ["--disable-component-update", "--disable-sync"]
    with sync.sync_playwright() as started:
        browser = started.chromium.launch_persistent_context(str(tmp_path), executable_path=str(chromium), args=quiet)
        page = browser.new_page()
        requested: list[str] = []
        page.on("request", lambda request: requested.append(request.url))
        page.goto((site / "index.html").as_uri())
        # The script listens for key presses, and only once it has started.
        page.locator("html.js").wait_for(timeout=600_000)
        page.locator(".md-search__input").press_sequentially("recall@k among")
        found = page.locator(".md-search-result__link", has_text="Evaluation").first
        found.wait_for(timeout=600_000)
        browser.close()
    assert [url for url in requested if not url.startswith(("file:", "data:", "blob:", "about:"))] == []


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
        examples = re.findall(r"\[b\](bridgekit .*?)\[/b\]", verb.help or "")
        assert any(example.startswith(name) for example in examples) or "Not installed" in (verb.help or ""), (
            f"{name}: no example"
        )
        for example in examples:
            assert complaint(example) is None, name
            checked += 1
    assert checked > 80


def test_every_command_is_run_or_says_what_it_needs() -> None:
    """Commands are in console blocks, and a file that they use is a block with its name in the first line."""
    for page in pages():
        text = _GENERATED.sub("", page.read_text(encoding="utf-8"))
        for block in blocks(text):
            where = f"{page.relative_to(ROOT)}: {block.content.splitlines()[0]}"
            if block.language == "console":
                assert block.commands, f"{where}: a console block without a line that begins with $"
                assert block.content.startswith("$ "), where
            else:
                assert block.needs or block.file or block.language in ("text", "csv"), f"{where}: neither a command nor a file"
        rest = re.sub(r"^```console$.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        stray = re.search(r"^ *(\$|bridgekit|torchrun|pip|python) .*", rest, re.MULTILINE)
        assert not stray, f"{page.name}: a command outside a console block: {stray and stray[0]}"


# ---- running them


class Reader:
    """Runs the pages' commands in a folder, in an environment that has all that this one has and takes what the pages install.

    `bridgekit` and `python SCRIPT` run in this process, which has imported torch already.
    """

    def __init__(self, base: Path, name: str) -> None:
        base = base.resolve()
        self.folder = base / name
        self.folder.mkdir(parents=True)
        self.home = f"/home/you/{name}"  # what the pages show in its place
        venv.create(base / "venv", symlinks=True)
        (self.packages,) = (base / "venv").glob("lib/python*/site-packages")
        # Unlike PYTHONPATH, addsitedir also reads .pth files, which editable installations consist of.
        sites = "; ".join(f"site.addsitedir({site!r})" for site in sys.path if site.endswith("site-packages"))
        (self.packages / "outer.pth").write_text(f"import site; {sites}\n", encoding="utf-8")
        commands = base / "venv" / "bin"
        for name, module in {"pip": "pip._internal.cli.main", "pytest": "pytest"}.items():
            (commands / name).write_text(f"#!{commands / 'python'}\nimport sys\nfrom {module} import main\nsys.exit(main())\n")
            (commands / name).chmod(0o755)
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
        self.environment |= {
            "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
            "COLUMNS": "80",
            "LC_ALL": "C",
            "HF_HUB_OFFLINE": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_RETRIES": "1",  # fail fast without a network
            "BRIDGEKIT_HOME": str(base / "cache"),
        }
        if _setuptools() >= 77:  # no build environment needed; 0 is pip's spelling of "no isolation"
            self.environment["PIP_NO_BUILD_ISOLATION"] = "0"

    def run(self, command: str) -> tuple[int, list[str]]:
        """Exit code, and the lines that a user would see."""
        words = shlex.split(command)
        in_process = words[0] == "bridgekit" or (words[0] == "python" and len(words) == 2)
        code, output = self._here(words) if in_process else self._in_a_shell(command)
        lines = [line.rstrip().replace(str(self.folder), self.home) for line in output.splitlines()]
        return code, [line for line in lines if not PROGRESS.fullmatch(line)]

    def _in_a_shell(self, command: str) -> tuple[int, str]:
        outputs = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(command, shell=True, cwd=self.folder, env=self.environment, text=True, **outputs)
        return done.returncode, done.stdout

    def _here(self, words: Sequence[str]) -> tuple[int, str]:
        output, code = io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            patch.chdir(self.folder)
            patch.setattr(sys, "argv", words if words[0] == "bridgekit" else words[1:])
            patch.setattr(sys, "path", [*sys.path])
            patch.setattr(sys, "meta_path", [*sys.meta_path])
            site_module.addsitedir(str(self.packages))
            importlib.invalidate_caches()
            for name in ("COLUMNS", "BRIDGEKIT_HOME", "HF_HUB_OFFLINE"):
                patch.setenv(name, self.environment[name])
            forget_plugins()
            try:
                cli.main() if words[0] == "bridgekit" else runpy.run_path(words[1], run_name="__main__")
            except SystemExit as stop:
                code = int(stop.code or 0)
            finally:
                forget_plugins()
        return code, output.getvalue()

    def labels(self) -> dict[str, str]:
        """Text to group, as pairs.csv has them."""
        table = self.folder / "pairs.csv"
        rows = csv.DictReader(table.read_text(encoding="utf-8").splitlines()) if table.exists() else []
        return {row["text"]: row["group"] for row in rows}


def _setuptools() -> int:
    try:
        return int(version("setuptools").split(".")[0])
    except PackageNotFoundError:
        return 0


def walk(reader: Reader, chosen: Sequence[Path]) -> Iterator[tuple[Path, str, list[str], int, list[str]]]:
    """Do what the pages say: save files, run commands. Gives page, command, the lines shown, exit code and the lines seen."""
    for page in chosen:
        for block in blocks(page.read_text(encoding="utf-8")):
            if block.needs:
                continue
            if block.file:
                name, excerpt = block.file
                path, content = reader.folder / name, block.content.split("\n", 1)[1]
                if excerpt:
                    assert content in path.read_text(encoding="utf-8"), f"{name} no longer contains what {page.name} quotes"
                else:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(block.content, encoding="utf-8")
            for command, shown in block.commands:
                yield page, command, shown, *reader.run(command)


def first_difference(shown: Sequence[str], seen: Sequence[str], labels: Mapping[str, str]) -> str | None:
    """The first line of a page that was not printed, None if all were. A line "..." allows others in between."""
    if not shown:
        return None
    wanted = [line for line in shown if line != "..."]
    cut = len(wanted) < len(shown)
    rest = iter(seen)
    for line in wanted:
        if not any(same(line, candidate, labels) for candidate in (rest if cut else islice(rest, 1))):
            return line
    return None if cut else next((f"nothing more, but there is: {line}" for line in rest), None)


def same(shown: str, seen: str, labels: Mapping[str, str]) -> bool:
    """Whether two lines have the same words, numbers that are about the same, and hits with the same label.

    Which of several items with one label is nearest may differ between versions of torch, and so may all nearest captions of an
    image but the first, and whatever random adapters retrieve.
    """
    if _words(shown, labels) != _words(seen, labels) or "passed in" in shown or _is_random(shown):
        return _words(shown, labels) == _words(seen, labels)
    numbers = [[float(number) for number in _NUMBER.findall(_first_nearest(line))] for line in (shown, seen)]
    return all(abs(a - b) <= (0.25 if max(a, b) <= 1 else 15) for a, b in zip(*numbers, strict=True))


def _words(line: str, labels: Mapping[str, str]) -> str:
    hit = re.fullmatch(r"(\s+)-?\d\.\d{3}  (.+)", line)
    if hit:
        return f"{hit[1]}{labels.get(hit[2]) or Path(hit[2]).name.split('-')[0]}"
    return " ".join((_ANY_NUMBER if _is_random(line) else _NUMBER).sub("#", _first_nearest(line)).split())


def _is_random(line: str) -> bool:
    return " random " in line


def _first_nearest(line: str) -> str:
    return re.sub(r"(: nearest captions: [^,]+),.*", r"\1", line)


@pytest.mark.skipif(os.name == "nt", reason="the commands are those of a Unix shell")
@pytest.mark.parametrize("motion", [False, True], ids=["words", "motion"])
def test_the_pages_commands_run_in_their_order_and_print_what_the_pages_show(
    motion: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bridgekit_starter", reason="the pages use the starter's encoders")
    monkeypatch.setitem(fit_conditioner.__kwdefaults__ or {}, "fit", Fit(steps=50))  # enough for twelve captions
    reader = Reader(tmp_path, "motion" if motion else "words")
    ran = []
    for page, command, shown, code, seen in walk(reader, [page for page in pages() if (page == MOTION) == motion]):
        printed = "\n".join([f"{page.name}: {command}", *seen])
        if code and command.startswith("pip download"):
            pytest.skip(f"the recordings cannot be downloaded: {' '.join(seen[-1:])}")
        assert code == 0, printed
        difference = first_difference(shown, seen, reader.labels())
        assert not difference, f"{printed}\n\nwhere the page has: {difference}"
        ran.append(page.name)
    if motion:
        assert len(ran) >= 9
    else:
        assert {"tutorial.md", "own-data.md", "evaluation.md", "own-encoder.md", "generate.md"} <= set(ran)
        assert (reader.folder / "pictures" / "sheet.png").stat().st_size > 10_000


@pytest.mark.skipif(os.name == "nt", reason="the commands are those of a Unix shell")
def test_the_readmes_first_commands_run_in_their_order_where_there_is_no_file_but_the_examples(tmp_path: Path) -> None:
    pytest.importorskip("bridgekit_starter", reason="they use the starter's bridge")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [first] = [part for part in re.split(r"\n{2,}", text) if part.startswith("    pip install")]
    install, *commands, page = [line.partition("  #")[0].strip() for line in first.splitlines()]
    assert install.startswith("pip install . plugins/bridgekit-starter")
    assert page == "bridgekit app"
    reader = Reader(tmp_path, "empty")
    (reader.folder / "examples").symlink_to(ROOT / "examples")
    for command in commands:
        code, seen = reader.run(command)
        assert code == 0, "\n".join([command, *seen])
        if command.startswith("bridgekit search"):
            assert "penguin" in seen[2]
    assert (reader.folder / "penguin.png").exists()


def test_numbers_may_differ_a_little_and_words_not_at_all() -> None:
    labels = {"a sprint": "running", "running fast": "running", "a walk": "walking"}
    assert same("   0.611  a sprint", "   0.570  running fast", labels)
    assert same("   0.611  /x/running-1.csv", "   0.570  /x/running-2.csv", labels)
    assert not same("   0.611  a sprint", "   0.611  a walk", labels)
    assert not same("   0.611  a sprint", "   0.311  a sprint", labels)
    assert not same("   0.611  running-1.csv", "   0.611  walking-1.csv", labels)
    assert same("  FuseMix  100.0  95.0", "  FuseMix   97.5  100.0", labels)
    assert not same("  FuseMix  100.0  95.0", "  FuseMix  70.0  95.0", labels)
    assert same("  FuseMix  76–100", "  FuseMix  65–98", labels)
    assert not same("  FuseMix  76–100", "  FuseMix  46–91", labels)
    assert same(" random  31.2  13", " random  30.0  12.5", labels)
    assert same("3 passed in 0.91s", "3 passed in 7.02s", labels)
    assert not same("3 passed in 0.91s", "2 passed in 0.91s", labels)
    assert not same("80 pairs", "79 pairs", labels)
    assert same("a.png: nearest captions: dog (0.91), cat (0.10)", "a.png: nearest captions: dog (0.90), cow (0.80)", labels)
    assert not same(
        "a.png: nearest captions: dog (0.91), cat (0.10)", "a.png: nearest captions: cat (0.91), dog (0.10)", labels
    )


def test_lines_may_be_left_out_only_where_the_page_says_so() -> None:
    assert first_difference([], ["anything"], {}) is None
    assert first_difference(["a", "b"], ["a", "b"], {}) is None
    assert first_difference(["a", "b"], ["a", "x", "b"], {}) == "b"
    assert first_difference(["a", "b"], ["a"], {}) == "b"
    assert "there is: c" in str(first_difference(["a"], ["a", "c"], {}))
    assert first_difference(["a", "b", "..."], ["x", "a", "b", "y"], {}) is None
    assert first_difference(["a", "b", "..."], ["b", "a"], {}) == "b"


def update_pages(base: Path) -> None:
    """Run the pages' commands, print their output and processor time, and put the numbers of this run into the pages."""
    for name, chosen in {"words": [page for page in pages() if page != MOTION], "motion": [MOTION]}.items():
        reader, since = Reader(base / name, name), sum(os.times()[:4])
        for page, command, shown, code, seen in walk(reader, chosen):
            now, labels = sum(os.times()[:4]), reader.labels()
            print(f"\n[{page.name}, {now - since:.1f} s] $ {command}", *seen, sep="\n")
            difference = first_difference(shown, seen, labels)
            print(f"[exit code {code}]" if code else "", f"[differs: {difference}]" if difference else "")
            rest = iter(seen)
            updated = [next((new for new in rest if _words(new, labels) == _words(line, labels)), line) for line in shown]
            text = page.read_text(encoding="utf-8")
            if shown and not difference and "passed in" not in "".join(shown):
                page.write_text(text.replace("\n".join(["", *shown, ""]), "\n".join(["", *updated, ""]), 1), encoding="utf-8")
            since = now


if __name__ == "__main__":
    update_pages(Path(sys.argv[1]))
