"""The bridge that comes with the starter: sounds and spoken names, from an empty folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import soundfile
import torch
from bridgekit_starter import bundled_bridge
from bridgekit_starter.voice import speak
from PIL import Image
from sklearn.datasets import load_sample_images

from bridgekit import Bridge
from bridgekit.plugins import load_encoder
from tests.conftest import Run

#: A few clips of ESC-10, which is in its training, and the names that are right. Its own measurements are of others.
RIGHT = {
    "dog_bark": {"dog", "dog face"},
    "rain": {"cloud with rain", "umbrella"},
    "sea_waves": {"water wave"},
    "helicopter": {"helicopter"},
    "rooster": {"rooster"},
    "baby_cry": {"baby"},
}


@pytest.fixture(scope="module")
def bridge() -> Bridge:
    folder = bundled_bridge()
    assert folder
    return Bridge.load(folder, "cpu")


def test_it_is_small_and_names_only_what_the_starter_has(bridge: Bridge) -> None:
    assert {side.encoder for side in bridge.sides.values()} == {"starter:audio", "starter:text", "starter:image"}
    assert bridge.folder
    assert sum(file.stat().st_size for file in bridge.folder.rglob("*.*")) < 4e6
    assert bridge.table_of("text") == bridge.table_of("image") == "starter:everyday"


def test_a_spoken_word_is_drawn_from_an_empty_folder(run: Run, tmp_path: Path) -> None:
    samples, rate = speak("penguin", "en-gb-x-gbclan+steph")
    soundfile.write(tmp_path / "word.wav", samples, rate)
    code, out, err = run("generate", "--audio", "word.wav", "--json")
    assert code == 0
    assert "Bridge: hearing (comes with bridgekit" in err
    [picture] = json.loads(out)["pictures"]
    assert picture["nearest"][0]["item"] == "penguin"
    assert picture["speech"] > 0.5
    assert picture["sure"]
    assert not json.loads(out)["conditioner"]["fitted"], "the conditioner comes with it"


def test_field_recordings_are_heard(bridge: Bridge, esc10: Path) -> None:
    names = [str(name) for name in everyday()]
    right = 0
    for kind, expected in RIGHT.items():
        clips = sorted((esc10 / "clips").glob(f"{kind}*"))[:4]
        hits = bridge.search("audio", clips, "text", names, k=3)
        right += sum(bool(expected & {hit.item for hit in found}) for found in hits)
        heard = bridge.heard("audio", bridge.embed("audio", clips), hits)
        assert sum(each.speech is not None and each.speech < 0.5 for each in heard) >= 3, kind
    assert right >= 20, "of 24"


def everyday() -> tuple[object, ...]:
    from bridgekit_starter.openmoji import build_everyday

    return build_everyday().columns["text"]


def test_what_no_sound_means_is_not_among_the_names() -> None:
    assert not [name for name in everyday() if any(word in str(name) for word in ("flag", "button", "keycap", "Aries"))]


def test_a_bridge_that_calls_whisper_starter_audio_gets_whisper() -> None:
    speech = load_encoder("starter:speech", "cpu")
    assert load_encoder("starter:audio", "cpu", speech.revision).revision == speech.revision
    assert load_encoder("starter:audio", "cpu").revision != speech.revision


def test_a_bridge_from_before_earlier_layers_embeds_images_as_it_did(bridge: Bridge) -> None:
    assert bridge.sides["image"].encoder == "starter:image"
    photographs = load_sample_images()
    found = bridge.embed("image", [Image.fromarray(pixels) for pixels in photographs.images])
    assert [Path(name).stem for name in photographs.filenames] == ["china", "flower"]
    texts = bridge.embed("text", ["flower", "castle", "dog"])
    # Printed by commit 3c64354, when `starter:image` had the last layer alone.
    expected = torch.tensor([[0.3041, 0.3547, 0.2626], [0.5001, 0.3697, 0.4407]])
    torch.testing.assert_close(found @ texts.T, expected, atol=2e-4, rtol=0)
    assert load_encoder("starter:image-last", "cpu").revision == bridge.sides["image"].revision
    assert load_encoder("starter:image", "cpu").dim > bridge.sides["image"].dim
