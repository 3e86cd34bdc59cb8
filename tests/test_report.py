"""The report: its content, its safety with untrusted text, and how it works in a browser."""

from __future__ import annotations

import csv
import html
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image, ImageDraw
from torch.nn.functional import normalize

from bridgekit import PRESETS, Bridge, align, write_report
from bridgekit.bridge.bridge import Side
from bridgekit.checks.findings import Finding
from bridgekit.errors import BridgekitError
from bridgekit.evaluation.recall import chance, split_recall
from bridgekit.fusion.adapter import Adapter, FusionAdapter
from bridgekit.latents.encoded import EncodedPairs, encode_pairs
from bridgekit.plugins import forget_plugins
from bridgekit.progress import silent
from bridgekit.report import report_page, table_results
from bridgekit.report.previews import CLIP_SECONDS, make_previews, outline
from bridgekit.report.space_map import shared_space
from bridgekit.report.tables import worst_and_best
from bridgekit.tables.reading import read_pairs
from tests.browser import DESKTOP, PHONE, browser_page, one_browser, screenshot
from tests.conftest import Run, tone
from tests.painting import PicturePlugin
from tests.shared import wait_until
from tests.toys import LetterEncoder, ToneEncoder, install, tone_table

if TYPE_CHECKING:
    from playwright.sync_api import Page

QUICK = replace(PRESETS["default"], epochs=15, batch_size=32, shared_dim=16)
#: What an untrusted table may contain.
HOSTILE = (
    "<script>window.harmed = 1</script>",
    '"><img src=x onerror="window.harmed = 2">',
    "</script><script>window.harmed = 3</script>",
    "'><svg/onload=window.harmed=4>",
    '<!-- ]]> &lt;b&gt; $\\frac{1}{2}$ & url(#x) href="#y"',
    '<a href="javascript:window.harmed=5">click</a> <style>*{display:none}</style>',
)


class Elements(HTMLParser):
    """All elements of a page, with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.found if tag == name]


# ---- the file


def toy_report(folder: Path) -> str:
    """The report that `align` puts beside a bridge of tones and names."""
    align(pairs=tone_table(folder, copies=10), out=folder / "tones", preset=QUICK, progress=False)
    return (folder / "tones" / "report.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("toy")
def test_align_writes_a_report_unless_told_not_to(run: Run, tmp_path: Path) -> None:
    table = tone_table(tmp_path)
    code, out, _ = run("align", "--pairs", table, "--out", "with")
    assert code == 0
    assert f"Report: {Path('with') / 'report.html'}" in out
    assert "text queries" in (tmp_path / "with" / "report.html").read_text(encoding="utf-8")
    code, out, _ = run("align", "--pairs", table, "--out", "without", "--no-report")
    assert code == 0
    assert "Report:" not in out
    assert not (tmp_path / "without" / "report.html").exists()
    assert (tmp_path / "without" / "training.png").exists()


@pytest.mark.usefixtures("toy")
def test_a_report_that_cannot_be_made_costs_no_bridge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bridgekit.report.page.shared_space", lambda held_out: 1 / 0)
    align(pairs=tone_table(tmp_path), out=tmp_path / "tones", preset=QUICK, progress=False)
    assert "the report could not be made: ZeroDivisionError" in capsys.readouterr().err
    assert (tmp_path / "tones" / "bridge.json").exists()
    assert not (tmp_path / "tones" / "report.html").exists()


@pytest.mark.usefixtures("toy")
def test_the_same_bridge_has_the_same_report_byte_for_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = toy_report(tmp_path)
    for name in ("one", "two"):
        write_report(tmp_path / "tones", tmp_path / f"{name}.html", check=False, progress=False)
        assert (tmp_path / f"{name}.html").read_text(encoding="utf-8") == first


@pytest.mark.usefixtures("toy")
def test_the_report_verb_rewrites_it_and_accepts_the_new_path_of_a_moved_table(run: Run, tmp_path: Path) -> None:
    first = toy_report(tmp_path)
    code, out, _ = run("report", "tones", "--out", "pages/new.html", "--no-check")
    assert code == 0
    assert out.startswith("Report: pages/new.html (")
    assert (tmp_path / "pages" / "new.html").read_text(encoding="utf-8") == first

    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (tmp_path / "clips").rename(moved / "clips")
    (tmp_path / "pairs.csv").rename(moved / "pairs.csv")
    code, _, err = run("report", "tones")
    assert code == 2
    assert "the table that the bridge was trained on is not here" in err
    assert "give its new path with --pairs" in err
    code, _, _ = run("report", "tones", "--pairs", moved / "pairs.csv")
    assert code == 0
    again = (tmp_path / "tones" / "report.html").read_text(encoding="utf-8")
    assert "ridge regression" in again  # the figures of the bridge's own table
    assert "is not the table this bridge was trained on" not in again


@pytest.mark.usefixtures("toy")
def test_another_table_is_reported_as_such(run: Run, tmp_path: Path) -> None:
    toy_report(tmp_path)
    code, _, _ = run("report", "tones", "--pairs", tone_table(tmp_path / "others", copies=3), "--out", "other.html")
    assert code == 0
    page = (tmp_path / "other.html").read_text(encoding="utf-8")
    assert "is not the table this bridge was trained on" in page
    assert "held out" not in page
    assert "held-out" not in page


def test_a_missing_bridge_is_a_message(run: Run) -> None:
    code, _, err = run("report", "nowhere")
    assert code == 2
    assert "there is no such folder" in err


@pytest.mark.usefixtures("toy")
def test_the_page_loads_nothing_and_allows_nothing(tmp_path: Path) -> None:
    page = toy_report(tmp_path)
    elements = Elements(page)
    links = [value for _, attributes in elements.found for key, value in attributes.items() if key in ("src", "href")]
    assert links
    assert all(link is not None and link.startswith(("#", "data:")) for link in links)
    policy = next(each["content"] for each in elements.named("meta") if each.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; media-src data:; style-src 'sha256-")
    assert "script-src 'sha256-" in policy
    assert set(re.findall(r"https?://[^\"'<> ]+", page)) == {"http://www.w3.org/2000/svg"}  # an XML namespace


@pytest.mark.usefixtures("toy")
def test_the_page_is_made_of_named_and_ordered_parts(tmp_path: Path) -> None:
    elements = Elements(toy_report(tmp_path))
    assert elements.named("html") == [{"lang": "en"}]
    assert len(elements.named("main")) == len(elements.named("h1")) == len(elements.named("title")[:1]) == 1
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in elements.found:
        for key in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(key) is None or attributes[key] in ids
    levels = [int(name[1]) for name, _ in elements.found if re.fullmatch("h[1-6]", name)]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert all("alt" in image for image in elements.named("img"))
    assert all(cell.get("scope") for cell in elements.named("th"))
    assert len(elements.named("table")) == len(elements.named("caption"))
    assert all(each.get("aria-labelledby") for each in elements.named("svg") if each.get("role") == "img")
    charts = [each for each in elements.named("svg") if each.get("role") == "img"]
    assert len(charts) == 6  # two directions, a heat map, cosines, loss, recall


@pytest.mark.usefixtures("toy")
def test_rows_set_aside_and_small_test_sets_are_caveats_before_the_results(tmp_path: Path) -> None:
    table = tone_table(tmp_path)
    with table.open("a", encoding="utf-8") as file:
        file.write("clips/gone.wav,gone\n")
    align(pairs=table, out=tmp_path / "tones", preset=QUICK, progress=False)
    page = (tmp_path / "tones" / "report.html").read_text(encoding="utf-8")
    caveats = page[page.index('id="caveats"') : page.index('id="recall"')]
    assert "1 of 121 rows were set aside" in caveats
    assert "audio → text (test, 12), text → audio (test, 7)" in caveats
    assert "a single query shifts recall by up to 14.3 percentage points" in caveats
    assert "there is no such file" in page[page.index('id="data"') :]


@pytest.mark.usefixtures("toy")
def test_the_verb_checks_the_data_unless_told_not_to(run: Run, tmp_path: Path) -> None:
    table = tone_table(tmp_path)
    soundfile.write(tmp_path / "clips" / "owl 0.wav", np.zeros(6_400), 16_000)
    align(pairs=table, out=tmp_path / "tones", preset=QUICK, progress=False)
    assert "silen" not in (tmp_path / "tones" / "report.html").read_text(encoding="utf-8")  # align does not take that time
    assert run("report", "tones", "--no-check")[0] == 0
    assert "silen" not in (tmp_path / "tones" / "report.html").read_text(encoding="utf-8")
    assert run("report", "tones")[0] == 0
    page = (tmp_path / "tones" / "report.html").read_text(encoding="utf-8")
    found = page[page.index('id="data"') :]
    assert re.search(r"<h3>\d+ warnings?</h3>\s*<ul class=\"findings\">", found)
    assert "silen" in found
    assert "owl 0.wav" in found


@pytest.mark.usefixtures("toy")
def test_a_bridge_cannot_make_the_report_read_a_table_elsewhere(
    run: Run, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tone_table(tmp_path_factory.mktemp("elsewhere"))
    align(pairs=elsewhere, out=tmp_path / "tones", preset=QUICK, write_report=False, progress=False)
    code, _, err = run("report", "tones")
    assert code == 2
    assert "reading it needs your permission" in err
    assert run("report", "tones", "--pairs", elsewhere, "--no-check")[0] == 0


# ---- its content


def small_report(folder: Path, **changes: Any) -> str:
    """The report on a bridge of four names and their tones that was never trained, with some of its fields changed."""
    encoded = toy_pairs(folder, 1).take(np.arange(4))
    torch.manual_seed(0)
    widths = {modality: latents.matrix.shape[1] for modality, latents in encoded.latents.items()}
    adapters: dict[str, Adapter] = {name: FusionAdapter(width, 32, 1, 2.0, 0.0).eval() for name, width in widths.items()}
    sides = {name: Side("toy:x", "toy-1", width, frozen=False) for name, width in widths.items()}
    bridge = Bridge(sides, adapters, PRESETS["default"], 0.07)
    findings = changes.pop("findings", ())
    bridge = replace(bridge, **changes)
    tables = [table_results(bridge, encoded, ["test"] * 4, bridge.metrics)]
    return report_page(bridge, "small", tables, findings=findings).decode()


def record(method: str, recall: float = 0.5, **changes: Any) -> dict[str, Any]:
    """Recall of a method, as in a bridge's metrics."""
    question = {"split": "test", "direction": "audio → text", "among": "split", "queries": 4, "candidates": 4}
    return {**question, "method": method, **{f"recall@{k}": recall for k in (1, 5, 10)}, "median_rank": 1.5, **changes}


def text_of(page: str) -> str:
    """What a page says, without its markup."""
    return " ".join(html.unescape(re.sub("<(script|style)\b.*?</\1>|<[^>]*>", " ", page, flags=re.DOTALL)).split())


def test_findings_of_the_check_are_listed_with_the_data(tmp_path: Path) -> None:
    rows = tuple(f"row {number}, audio: <i>{number}</i>.wav" for number in range(30))
    findings = [
        Finding("leak", "error", "30 rows leak", "remove them", rows),
        Finding("variety", "note", "few <b>rows", "add some"),
    ]
    page = small_report(tmp_path, findings=findings)
    section = page[page.index('id="data"') :]
    assert "30 rows leak. Remove them." in section
    assert "few &lt;b&gt;rows. Add some." in section
    assert "row 0, audio: &lt;i&gt;0&lt;/i&gt;.wav" in section
    assert "row 20" not in section
    assert "and 10 more" in section
    assert section.index("error") < section.index("note")


def test_findings_and_caveats_are_grouped_with_warnings_before_notes(tmp_path: Path) -> None:
    kinds = ["note", "warning", "error", "warning", "note", "note"]  # of two tables, one after the other
    findings = [Finding("kind", grade, f"{grade} {number}", "mend it") for number, grade in enumerate(kinds)]
    metrics = [record("linear", 0.75), record("FuseMix", 0.5)]
    history = [{"epoch": epoch, "loss": 1.0, "score": 0.1 * epoch} for epoch in (1, 2)]
    page = small_report(tmp_path, findings=findings, metrics=metrics, history=history)
    data = page[page.index('id="data"') : page.index('id="provenance"')]
    assert re.findall("<h3>(.*?)</h3>", data) == ["1 error", "2 warnings", "3 notes"]
    assert re.findall(r"(?:note|warning|error) \d", data) == ["error 2", "warning 1", "warning 3", "note 0", "note 4", "note 5"]
    caveats = page[page.index('id="caveats"') : page.index('id="recall"')]
    warnings, notes = caveats[caveats.index("<h3>Warnings</h3>") :].split("<h3>Notes</h3>")
    assert "The check of the data found 1 error and 2 warnings: see Data ." in text_of(warnings)
    assert "Linear regression has the higher recall:" in warnings
    assert "training for more epochs may help" in notes


def test_untrusted_metadata_is_escaped(tmp_path: Path) -> None:
    for number, text in enumerate(HOSTILE):
        page = small_report(
            tmp_path / str(number),
            sides={modality: Side(text, text, 64, frozen=False) for modality in ("audio", "text")},
            provenance={
                text: text,
                "command": text,
                "modality_gap": {text: 0.5},
                "bound": [{"modality": "text", "seed": text}],
            },
            metrics=[record(text), record("FuseMix")],
            history=[{"epoch": 1, "score": 0.5, "loss": 1.0, "recall@1 audio → text": 0.5}],
            findings=[Finding(text, text, text, text, (text,))],
        )
        found = Elements(page)
        allowed = (
            "html head meta link title style body header div h1 bdi button p nav a noscript main section h2 h3 h4 ul ol li"
        )
        allowed += (
            " details summary span figure figcaption svg desc text path rect polyline g table caption thead tbody tr th td"
        )
        allowed += " footer small dl dt dd pre code label input output script strong lineargradient stop"
        assert {name for name, _ in found.found} <= set(allowed.split())
        assert len(found.named("script")) == 4
        assert not [key for _, attributes in found.found for key in attributes if key.startswith("on")]
        assert all((each.get("href") or "#").startswith(("#", "data:,")) for _, each in found.found)
        assert text_of(page).count(" ".join(text.split())) >= 9  # each of them is shown, word for word


@pytest.mark.parametrize(
    "changes", [{"split": "nowhere"}, {"direction": "audio → smell"}, {"direction": "smell → text"}, {"split": ""}]
)
def test_metrics_that_are_not_about_the_table_are_one_message(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(BridgekitError, match="the bridge's metrics are not about this table: no row of its split"):
        small_report(tmp_path, metrics=[record("FuseMix"), record("FuseMix", **changes)])


@pytest.mark.parametrize("odd", [{}, {"epoch": 2}, {"epoch": 2, "loss": 1, "score": 1, "recall@1 audio → text": 1}])
def test_a_history_that_lacks_numbers_is_one_message(tmp_path: Path, odd: dict[str, float]) -> None:
    with pytest.raises(BridgekitError, match=r"history\.jsonl does not have the same numbers for every epoch"):
        small_report(tmp_path, history=[{"epoch": 1, "loss": 1, "score": 1}, odd])


@pytest.mark.usefixtures("toy")
def test_nonsense_metrics_of_a_saved_bridge_are_a_message_and_exit_code_2(run: Run, tmp_path: Path) -> None:
    table = tone_table(tmp_path)
    align(pairs=table, out=tmp_path / "tones", preset=QUICK, write_report=False, progress=False)
    file = tmp_path / "tones" / "bridge.json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    for changes in ({"split": "nowhere"}, {"direction": "text → smell"}, {"recall@1": 2}, {"queries": None}):
        broken = {**saved, "metrics": [{**saved["metrics"][0], **changes}]}
        file.write_text(json.dumps(broken), encoding="utf-8")
        code, out, err = run("report", "tones", "--no-check")
        assert (code, out) == (2, "")
        assert "metrics" in err
        assert "fix: " in err
    # Numbers that cannot be, but can be shown, are no reason to refuse a report.
    odd = {"queries": 2**53, "candidates": 0, "among": "sideways", "median_rank": 0}
    file.write_text(json.dumps({**saved, "metrics": [{**saved["metrics"][0], **odd}]}), encoding="utf-8")
    assert run("report", "tones", "--no-check")[0] == 0


def test_methods_are_listed_in_order_with_explanations_and_unknown_ones_first(tmp_path: Path) -> None:
    methods = ["FuseMix", "linear", "closed-form start", "random"]
    page = small_report(tmp_path, metrics=[record(method) for method in [*methods, "guess"]])
    rows = re.findall(r'<th scope="row">(?:<bdi>)?([^<]+)', page[page.index('id="recall"') : page.index('id="retrievals"')])
    assert rows == ["chance", "guess", "random", "closed-form start", "linear", "FuseMix"]
    said = text_of(page)
    assert "random: adapters with random weights" in said
    assert "closed-form start: the closed-form solution that training starts from" in said
    assert "untrained" not in said
    old = small_report(tmp_path / "old", metrics=[record("untrained"), record("FuseMix")])
    assert "untrained: adapters with random weights" in text_of(old)


def test_the_first_sentence_gives_recall_beside_regression_and_chance(tmp_path: Path) -> None:
    metrics = [record("linear", 0.75), record("FuseMix", 0.5)]
    said = text_of(small_report(tmp_path, metrics=metrics))
    sentence = (
        "Of 4 audio queries, 50.0% retrieve a correct text first from a gallery of 4 (linear regression 75.0%, chance 25.0%)."
    )
    assert sentence in said
    assert (
        "Linear regression has the higher recall: test, audio → text: recall@1 75.0% against 50.0%; with 4 queries, the "
        "difference may be chance." in said
    )
    assert "50.0 (15–85)" in said  # the 95% confidence interval of 2 of 4 (Wilson)


def test_a_bridge_that_was_never_measured_has_a_report_that_says_so(tmp_path: Path) -> None:
    said = text_of(small_report(tmp_path))
    assert "No test rows were held out, so retrieval was not measured." in said
    assert "audio and text: no held-out row has both" in said
    assert "Training" not in said


def toy_pairs(folder: Path, copies: int) -> EncodedPairs:
    """Real clips of tones and their names: so many clips have the same name."""
    pairs = read_pairs(tone_table(folder, copies), ("audio", "text"))
    return encode_pairs(pairs, {"audio": ToneEncoder(), "text": LetterEncoder()}, silent)


def test_chance_is_what_random_embeddings_get(tmp_path: Path) -> None:
    encoded = toy_pairs(tmp_path, 4)
    rows = np.arange(24, 80)  # not all clips, all whole names
    found: dict[tuple[str, str, str, int], list[float]] = {}
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        embedded = {
            modality: normalize(torch.randn(len(latents.matrix), 8, generator=generator), dim=1)
            for modality, latents in encoded.latents.items()
        }
        for query, answer, among in itertools.product(("audio", "text"), ("audio", "text"), ("split", "all")):
            if query != answer:
                recall = split_recall(encoded, embedded, rows, query, answer, among)
                for k in (1, 5):
                    found.setdefault((query, answer, among, k), []).append(recall.at[k])
    for (query, answer, among, k), values in found.items():
        expected = chance(encoded, rows, query, answer, among, (k,))[k]
        assert np.mean(values) == pytest.approx(expected, abs=4 * np.std(values) / np.sqrt(len(values)) + 0.002)
    assert chance(encoded, rows, "audio", "text", "split", (1,))[1] == pytest.approx(1 / 14)
    assert chance(encoded, rows, "text", "audio", "split", (1,))[1] == pytest.approx(4 / 56)
    # One clip of each name: its other three are right too, and are left out of the ranking among all.
    assert chance(encoded, rows[::4], "text", "audio", "all", (1,))[1] == pytest.approx(1 / 77)


def test_the_worst_and_the_best_are_those_with_the_widest_margins(tmp_path: Path) -> None:
    encoded = toy_pairs(tmp_path, 1).take(np.arange(4))  # ant, bee, cat, dog
    texts = torch.eye(5)[:4]
    clips = normalize(
        torch.tensor(
            [
                [0.5, 0.0, 0.0, 0.0, 0.9],  # right, by far, though not very like it
                [0.8, 0.2, 0.0, 0.0, 0.0],  # wrong, by far: ant is found
                [0.0, 0.5, 0.6, 0.0, 0.0],  # right, just so
                [0.0, 0.0, 0.5, 0.1, 0.9],  # wrong: cat is found
            ]
        ),
        dim=1,
    )
    worst, best = worst_and_best(encoded, {"audio": clips, "text": texts}, "audio", "text", 2)
    assert [(case.correct, case.found, case.rank) for case in worst] == [("bee", "ant", 2), ("dog", "cat", 2)]
    assert [(case.correct, case.found, case.rank) for case in best] == [("ant", "ant", 1), ("cat", "cat", 1)]
    assert best[0].found_cosine == best[0].correct_cosine == pytest.approx(0.5 / np.hypot(0.5, 0.9))
    assert worst[0].found_cosine == pytest.approx(0.8 / np.hypot(0.8, 0.2))
    assert worst[0].correct_cosine == pytest.approx(0.2 / np.hypot(0.8, 0.2))
    assert isinstance(worst[0].query, Path)


def test_no_single_answer_fills_a_list_of_cases(tmp_path: Path) -> None:
    encoded = toy_pairs(tmp_path, 6)
    embedded = {
        modality: normalize(torch.randn(len(latents.matrix), 8, generator=torch.Generator().manual_seed(1)), dim=1)
        for modality, latents in encoded.latents.items()
    }
    for cases in worst_and_best(encoded, embedded, "audio", "text", 15):
        assert len({case.correct for case in cases}) == len(cases) == 15


def test_a_map_shows_whole_rows_up_to_its_limit_and_links_their_items(tmp_path: Path) -> None:
    encoded = toy_pairs(tmp_path, 3)
    embedded = {modality: normalize(latents.matrix, dim=1)[:, :32] for modality, latents in encoded.latents.items()}
    points = shared_space([(encoded, embedded)], limit=40)
    assert 36 <= len(points) <= 40
    assert all(0 <= each <= 1 for point in points for each in (point.x, point.y))
    for index, point in enumerate(points):
        assert point.partners
        for other, cosine in point.partners.items():
            assert index in points[other].partners
            assert cosine == pytest.approx(points[other].partners[index], abs=1e-6)
            clip, name = (point, points[other]) if point.modality == "audio" else (points[other], point)
            assert Path(clip.item).stem.split()[0] == name.item
    assert points == shared_space([(encoded, embedded)], limit=40)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_map_works_with_a_handful_of_items(tmp_path: Path, rows: int) -> None:
    encoded = toy_pairs(tmp_path, 1).take(np.arange(rows))
    embedded = {modality: normalize(latents.matrix, dim=1)[:, :32] for modality, latents in encoded.latents.items()}
    assert len(shared_space([(encoded, embedded)])) == 2 * rows


def test_previews_are_small_whole_and_within_their_limit(tmp_path: Path) -> None:
    long = tone(tmp_path / "long.wav", 300, seconds=14)
    clips = [tone(tmp_path / f"{number}.wav", 200 + number) for number in range(60)]
    picture = tmp_path / "wide.png"
    Image.new("RGB", (600, 300), "red").save(picture)
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF nothing")
    made = make_previews([("audio", long), ("image", picture), ("audio", broken), ("text", "a word"), ("motion", broken)])
    assert set(made) == {("audio", long), ("image", picture)}
    assert made["audio", long].seconds == 14
    kind, data = made["audio", long].uri.split(";base64,")
    assert kind == "data:audio/mpeg"
    heard = tmp_path / "heard.mp3"
    heard.write_bytes(__import__("base64").b64decode(data))
    assert soundfile.info(heard).duration == pytest.approx(CLIP_SECONDS, abs=0.2)
    assert made["image", picture].uri.startswith("data:image/webp;base64,")

    whole = make_previews([("audio", clip) for clip in clips])
    assert len(whole) == 60
    limit = sum(len(preview.uri) for preview in whole.values()) // 2
    some = make_previews([("audio", clip) for clip in clips], limit=limit)
    assert 20 < len(some) < 40
    assert list(some) == list(whole)[: len(some)]  # the most wanted
    assert sum(len(preview.uri) for preview in some.values()) <= limit


def test_an_outline_follows_the_loudness() -> None:
    wave = np.concatenate([np.zeros(4_800), np.ones(4_800)]).astype(np.float32)
    bars = re.findall(r"v(\d+)", outline(wave))
    assert bars == ["2"] * 24 + ["14"] * 24
    assert outline(np.zeros(1, np.float32)).count("M") == 48


# ---- in a browser


@pytest.fixture(scope="module", autouse=True)
def chromium() -> Iterator[None]:
    """Show all pages in one browser."""
    with one_browser():
        yield


@pytest.fixture(scope="module")
def real_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on a small bridge of real field recordings, drawn pictures and words, by toy encoders."""
    from tests.conftest import SHARED

    source = SHARED / "data" / "esc10"
    if not source.is_dir():
        pytest.skip("the ESC-10 recordings lie beside the project in ../shared/data/esc10, and they are not here")
    folder = tmp_path_factory.mktemp("real")
    with (source / "clips.csv").open(encoding="utf-8") as file:
        clips = sorted(csv.DictReader(file), key=lambda row: (row["fold"], row["audio"]))[::7]
    with (folder / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["audio", "image", "text", "split"])
        for number, row in enumerate(clips):
            picture = folder / f"picture {number}.png"
            _draw(picture, row["label"], number)
            split = {"5": "test", "4": "val"}.get(row["fold"], "train")
            writer.writerow([source / row["audio"], picture.name, f"{row['label']}, take {number}", split])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BRIDGEKIT_HOME", str(tmp_path_factory.mktemp("home")))
        install(patch, PicturePlugin())
        align(pairs=folder / "pairs.csv", out=folder / "sounds", preset=QUICK, outside=True, progress=False)
    forget_plugins()
    return folder / "sounds" / "report.html"


def _draw(path: Path, label: str, number: int) -> None:
    """A picture that its label decides, with a little of its own."""
    picture = Image.new("RGB", (96, 64), "white")
    pen = ImageDraw.Draw(picture)
    draw = np.random.default_rng(sum(label.encode())).integers(0, 60, 12).tolist()
    for x, y in zip(draw[:6], draw[6:], strict=True):
        pen.ellipse((x, y, x + 20 + number % 5, y + 12), fill=f"hsl({6 * x}, 80%, 50%)")
    picture.save(path)


@pytest.fixture(scope="module")
def crowded_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on 60 held-out triples whose names are long, begin alike, and are of wide and of narrow characters."""
    folder = tmp_path_factory.mktemp("crowded")
    kinds = ("MMMM WWWW", "中文字幕很宽", "lilliputian illness", "a dog that barks at the sea", "rain")
    with (folder / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["audio", "image", "text", "split"])
        for number in range(140):
            name = f"a photo and a recording of {kinds[number % 5]} {kinds[number % 5]} somewhere, take {number}"
            tone(folder / f"{name}.wav", 200 + 9 * number)
            _draw(folder / f"{name}.png", f"{number}", number)
            writer.writerow([f"{name}.wav", f"{name}.png", name, "train" if number < 70 else "val" if number < 80 else "test"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BRIDGEKIT_HOME", str(tmp_path_factory.mktemp("home")))
        install(patch, PicturePlugin())
        align(pairs=folder / "pairs.csv", out=folder / "crowded", preset=QUICK, progress=False)
    forget_plugins()
    return folder / "crowded" / "report.html"


def points_of(page: Page) -> list[dict[str, object]]:
    return json.loads(page.locator("#items").text_content() or "")


def place(page: Page, item: dict[str, object]) -> tuple[float, float]:
    """Where an item lies in the window."""
    box = page.locator("#points").bounding_box()
    assert box is not None
    x, y = item["at"]  # type: ignore[misc]
    return box["x"] + x * box["width"] / 1000, box["y"] + y * box["height"] / 1000


def shown_cell(heat: dict[str, Any], row: int, column: int) -> str:
    """What the page says of a cell of a heat map."""
    cosine = f"{heat['cosines'][row][column]:.2f}".replace("-", "−")
    return f"{heat['rows'][row]} × {heat['columns'][column]}: {cosine}"


def playing(page: Page, name: str) -> None:
    """Wait until a clip plays: its player advances."""
    page.wait_for_function(
        """name => [...document.querySelectorAll(".play")].some(
            (button) => button.getAttribute("aria-label") === `Play ${name}`
                && parseFloat(button.style.getPropertyValue("--played")) > 1)""",
        arg=name,
    )


def test_a_hover_shows_the_text_and_the_picture_and_plays_the_clip(real_report: Path) -> None:
    asked: list[str] = []
    with browser_page() as page:
        page.on("request", lambda request: asked.append(request.url))
        page.goto(real_report.as_uri())
        page.mouse.click(2, 2)  # browsers play nothing before
        page.locator("#points").scroll_into_view_if_needed()
        items = points_of(page)
        card = page.locator("#card")
        for modality, shown in (("text", ".text"), ("image", "img"), ("audio", ".play")):
            item = next(item for item in items if item["modality"] == modality)
            page.mouse.move(*place(page, item))
            card.locator(f":scope > {shown}").wait_for()
            assert item["name"] in card.inner_text()
            if modality == "image":
                assert card.locator(":scope > img").evaluate("image => image.decode().then(() => image.naturalWidth)") == 96
            if modality == "audio":
                playing(page, str(item["name"]))
        # Beside the clip stands what belongs to it.
        assert card.locator("li img").count() == 1
        assert card.locator("li .text").count() == 1
        screenshot(page, "report-map-hover")
    assert {url for url in asked if not url.startswith("data:")} == {real_report.as_uri()}


def test_the_retrievals_are_seen_and_heard(real_report: Path) -> None:
    with browser_page() as page:
        page.goto(real_report.as_uri())
        worst = page.locator("#retrievals details[open] .cases").first
        assert worst.locator("li").count() == 5
        player = page.locator("#retrievals details[open] .play").first
        name = (player.get_attribute("aria-label") or "").removeprefix("Play ")
        player.click()
        playing(page, name)
        player.click()  # stops it
        page.wait_for_function(
            "() => [...document.querySelectorAll('.play')].every(b => b.style.getPropertyValue('--played') === '0%')"
        )
        assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")


def test_before_a_first_click_the_page_says_why_it_is_silent(real_report: Path) -> None:
    with browser_page() as page:
        # As browsers do by themselves, but for those that are driven.
        page.add_init_script(
            "HTMLMediaElement.prototype.play = async () => { throw new DOMException('', 'NotAllowedError'); };"
        )
        page.goto(real_report.as_uri())
        page.locator("#points").scroll_into_view_if_needed()
        clip = next(item for item in points_of(page) if item["modality"] == "audio")
        page.mouse.move(*place(page, clip))
        page.get_by_text("only after the first click").wait_for()


def test_the_map_can_be_used_by_keyboard_alone(real_report: Path) -> None:
    with browser_page() as page:
        page.goto(real_report.as_uri())
        page.locator("#find").focus()
        page.keyboard.type("rooster")
        items = points_of(page)
        hits = [item for item in items if "rooster" in str(item["name"])]
        assert 0 < len(hits) < len(items)
        assert page.locator("#found").inner_text() == f"{len(hits)} of {len(items)}"
        page.keyboard.press("Enter")
        card = page.locator("#card")
        assert str(hits[0]["name"]) in card.inner_text()
        page.keyboard.press("End")  # dimmed points can be reached, but arrow keys skip them
        visited = set()
        for key in ("Home", *["ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"] * 3):
            page.keyboard.press(key)
            visited.add(page.evaluate("document.activeElement.getAttribute('aria-label')"))
        assert len(visited) > 1
        assert page.locator(".point[tabindex='0']").count() == 1
        clip = next(number for number, item in enumerate(items) if item["modality"] == "audio")
        page.locator(".point").nth(clip).focus()
        page.keyboard.press("Enter")
        playing(page, str(items[clip]["name"]))
        page.keyboard.press("Escape")
        card.locator("button.go").first.focus()
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.classList.contains('chosen')")


def test_a_heat_map_is_read_by_pointer_and_by_keyboard(real_report: Path) -> None:
    with browser_page() as page:
        page.goto(real_report.as_uri())
        figure = page.locator(".heat").first
        figure.scroll_into_view_if_needed()
        heats = json.loads(page.locator("#heats").text_content() or "")
        heat = heats[figure.get_attribute("data-heat")]
        figure.locator(".scrolling").focus()
        for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
            page.keyboard.press(key)
        assert figure.locator("output").inner_text() == shown_cell(heat, 1, 1)
        box = figure.locator("[id$=-cells]").bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + box["width"] * 2.5 / len(heat["columns"]), box["y"] + 3)
        assert figure.locator("output").inner_text() == shown_cell(heat, 0, 2)


#: The boxes of the texts and pictures that a selector names, and of what holds them, with the sizes of fonts, as shown.
BOXES = """(selector) => [...document.querySelectorAll(selector)].filter((part) => part.getClientRects().length).map((part) => {
  const { left, top, right, bottom } = part.getBoundingClientRect();
  const svg = part.closest("svg"), frame = svg.getBoundingClientRect();
  const font = parseFloat(getComputedStyle(part).fontSize) * frame.width / svg.viewBox.baseVal.width;
  const inside = left >= frame.left - 1 && right <= frame.right + 1 && top >= frame.top - 1 && bottom <= frame.bottom + 1;
  return { box: [left, top, right, bottom], font, inside, text: part.textContent };
})"""


def overlapping(boxes: list[dict[str, Any]], allowed: float) -> list[tuple[str, str]]:
    """Pairs of parts that overlap by more than some CSS pixels in both directions."""
    found = []
    for one, other in itertools.combinations(boxes, 2):
        (a, b, c, d), (e, f, g, h) = one["box"], other["box"]
        if min(c, g) - max(a, e) > allowed and min(d, h) - max(b, f) > allowed:
            found.append((one["text"], other["text"]))
    return found


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_labels_of_a_heat_map_can_be_read(crowded_report: Path, size: tuple[int, int]) -> None:
    with browser_page(*size, touch=size == PHONE) as page:
        page.goto(crowded_report.as_uri())
        for number in range(3):
            rows = page.evaluate(BOXES, f"#heat-{number}-cells ~ g text.end:not([transform])")
            columns = page.evaluate(BOXES, f"#heat-{number}-cells ~ g text.end[transform]")
            for labels in (rows, columns):
                assert len(labels) == 24
                assert len({label["text"] for label in labels}) == 24, "names that differ have labels that differ"
                assert all(label["font"] >= 11 and label["inside"] for label in labels)
                assert not overlapping(labels, 3)  # boxes are as high as the font's longest letters
                assert sum(len(label["text"]) for label in labels) > 24 * 12
        # The value below the map is of the whole names.
        heat = json.loads(page.locator("#heats").text_content() or "")["heat-2"]
        assert all(name.startswith("a photo and a recording of") for name in heat["columns"])
        page.locator(".heat").first.scroll_into_view_if_needed()
        screenshot(page, f"report-heat-{'phone' if size == PHONE else 'desktop'}")


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_map_says_what_is_where_by_labels_that_do_not_overlap(crowded_report: Path, size: tuple[int, int]) -> None:
    with browser_page(*size, touch=size == PHONE) as page:
        page.goto(crowded_report.as_uri())
        texts, pictures = (page.evaluate(BOXES, f"#points .labels {kind}") for kind in ("text", "image"))
        assert len(texts) + len(pictures) >= (24 if size == DESKTOP else 10)
        assert len(texts) >= 3
        assert len(pictures) >= 3
        assert all(each["inside"] for each in texts + pictures)
        assert all(text["font"] > 11 for text in texts)
        assert not overlapping(texts + pictures, 2)
        shown = page.locator("#points .labels image:visible")
        assert all((shown.nth(each).get_attribute("href") or "").startswith("data:image") for each in range(len(pictures)))
        items = points_of(page)
        for label in page.locator("#points .labels text:visible").all():
            assert str(items[int(label.get_attribute("data-item") or "")]["name"]).startswith("a photo and")
        page.locator("#points").scroll_into_view_if_needed()
        screenshot(page, f"report-labels-{'phone' if size == PHONE else 'desktop'}")


def test_a_table_that_scrolls_on_a_phone_says_so(crowded_report: Path) -> None:
    hint = "(place) => getComputedStyle(place, '::before').content"
    with browser_page(390, 800, touch=True) as page:
        page.goto(crowded_report.as_uri())
        page.locator("summary", has_text="All numbers").click()
        table = page.locator("#recall .scrolling")
        wait_until(lambda: "scroll sideways" in table.evaluate(hint), "for the hint")
        table.scroll_into_view_if_needed()
        screenshot(page, "report-scrolling-phone")
        edge = page.evaluate("document.documentElement.scrollWidth")
        assert edge == 390  # the table scrolls, the page does not
    with browser_page() as page:
        page.goto(crowded_report.as_uri())
        page.locator("summary", has_text="All numbers").click()
        page.wait_for_timeout(100)  # time for a hint that should not come
        assert page.locator("#recall .scrolling").evaluate(hint) == "none"


def test_a_tap_on_a_phone_selects_a_point_and_plays_it(real_report: Path) -> None:
    with browser_page(*PHONE, touch=True) as page:
        page.goto(real_report.as_uri())
        page.locator("#points").scroll_into_view_if_needed()
        clip = next(item for item in points_of(page) if item["modality"] == "audio")
        page.touchscreen.tap(*place(page, clip))
        playing(page, str(clip["name"]))
        screenshot(page, "report-map-phone")


CONTRAST = """() => {
  const parse = (text) => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
    return [r, g, b, a];
  };
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const under = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour[3] === 1) return colour;
    }
    return [255, 255, 255, 1];
  };
  const least = {};
  for (const element of document.querySelectorAll("body *")) {
    const texts = [...element.childNodes].filter((node) => node.nodeType === 3 && node.data.trim());
    if (!texts.length || element.closest("script, noscript, title, desc") || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const [a, b] = [light(parse(element instanceof SVGElement ? style.fill : style.color)), light(under(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) least[`${element.tagName}.${element.getAttribute("class")}: ${texts[0].data.trim().slice(0, 30)}`] = ratio;
  }
  return least;
}"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_is_legible_on_desktop_and_phone_in_light_and_dark(real_report: Path, size: tuple[int, int], dark: bool) -> None:
    with browser_page(*size, dark, touch=size == PHONE) as page:
        page.goto(real_report.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == size[0]  # nothing to scroll sideways
        assert page.evaluate(CONTRAST) == {}
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
            "rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)"
        )
        name = f"report-{'phone' if size == PHONE else 'desktop'}-{'dark' if dark else 'light'}"
        assert len(screenshot(page, name, full=True)) > 50_000
        page.locator("#theme").click()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
            "rgb(255, 255, 255)" if dark else "rgb(20, 23, 28)"
        )
        assert page.evaluate(CONTRAST) == {}


def test_charts_and_tables_work_without_javascript(real_report: Path) -> None:
    with browser_page(javascript=False) as page:
        page.goto(real_report.as_uri())
        assert page.locator("noscript p").is_visible()
        page.locator("summary", has_text="All numbers").click()
        assert page.locator("#recall td", has_text="(").first.is_visible()
        assert not page.locator("#theme").is_visible()


@pytest.mark.usefixtures("toy")
def test_an_untrusted_table_cannot_run_anything_in_the_page(tmp_path: Path) -> None:
    table = tone_table(tmp_path)
    rows = list(csv.reader(table.open(encoding="utf-8", newline="")))
    names = sorted({text for _, text in rows[1:]})
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["audio", "text", "split"])
        for number, (clip, name) in enumerate(rows[1:]):
            # Every seventh clip is held out, so that each text is.
            text = f"{HOSTILE[names.index(name) % len(HOSTILE)]} {name}"
            hostile = tmp_path / "clips" / f"<img src=x onerror='window.harmed=6'>{number}.wav"
            (tmp_path / clip).rename(hostile)
            writer.writerow([f"clips/{hostile.name}", text, ("test", "val")[number % 2] if number % 7 < 2 else "train"])
        writer.writerow(["clips/<script>window.harmed=7</script>.wav", "<b>gone</b>", "train"])
    align(pairs=table, out=tmp_path / "tones", preset=QUICK, progress=False)
    with browser_page() as page:
        page.on("dialog", lambda dialog: dialog.dismiss())
        page.goto((tmp_path / "tones" / "report.html").as_uri())
        page.locator("#retrievals details").evaluate_all("all => all.forEach((one) => { one.open = true; })")
        items = points_of(page)
        card = page.locator("#card")
        for number, item in enumerate(items):
            page.locator(".point").nth(number).focus()
            assert str(item["name"]) in card.inner_text()
        assert all(any(text in str(item["name"]) for item in items) for text in HOSTILE)  # each was shown, word for word
        assert "<script>window.harmed=7</script>.wav" in page.locator("#data").inner_text()
        assert page.evaluate("window.harmed") is None
        assert page.evaluate("document.querySelectorAll('script').length") == 4
        assert page.evaluate("document.querySelectorAll('[onerror], [onload], a[href^=javascript]').length") == 0
        assert page.locator("img[src='x']").count() == 0
