"""The whole way on real encoders and real speech, small: forty names in four voices, one of them held out."""

from __future__ import annotations

from pathlib import Path

import pytest
from bridgekit_starter import spoken
from bridgekit_starter.openmoji import pictures
from bridgekit_starter.spoken import Clip

from bridgekit import Bridge, Input, Pairs, align, generate
from bridgekit.diffusion.conditioner import Fit, fit_conditioner

VOICES = {"en-us+m3": "train", "en+f4": "train", "en-gb-x-rp+m1": "train", "en-us-nyc+m6": "test"}


def test_names_spoken_by_a_voice_never_heard_are_found_among_forty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRIDGEKIT_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(fit_conditioner.__kwdefaults__ or {}, "fit", Fit(steps=400))  # enough for forty captions
    names = [picture.name for picture in pictures()][::46][:40]
    clips = [Clip(name, voice, split) for name in names for voice, split in VOICES.items()]
    files = spoken._speak(clips)
    pairs = Pairs(
        columns={"audio": tuple(files), "text": tuple(clip.name for clip in clips)},
        source="forty names",
        rows=tuple(range(len(clips))),
        split=tuple("val" if clip.voice == "en+f4" else clip.split for clip in clips),
    )
    bridge = align("audio", "text", pairs, out=tmp_path / "bridge", progress=False)
    figures = {
        record["method"]: record["recall@1"]
        for record in bridge.metrics
        if record["direction"] == "audio → text" and record["among"] == "split"
    }
    assert figures["FuseMix"] >= 0.8
    assert figures["random"] <= 0.2
    hits = Bridge.load(tmp_path / "bridge").search("audio", files[3], "text", names, k=5)[0]
    assert names[0] in [hit.item for hit in hits]

    captions = tmp_path / "names.txt"
    captions.write_text("\n".join(names), encoding="utf-8")
    unheard = files[3::4]
    done = generate(tmp_path / "bridge", [Input("audio", unheard)], captions=captions, out=tmp_path / "seen", progress=False)
    right = [made.nearest[0].item == name for made, name in zip(done.pictures, names, strict=True)]
    assert sum(right) >= 32
    assert done.conditioner.cosine > 0.9
    assert all(made.file.stat().st_size > 500 for made in done.pictures)
    again = generate(tmp_path / "bridge", [Input("audio", unheard[0])], out=tmp_path / "again.png", progress=False)
    assert not again.fitted
