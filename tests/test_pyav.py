"""What phones and browsers record (m4a, aac, mp4, webm) is read by PyAV within the bounds of any audio, or refused."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bridgekit.decoding import decoders, isolation
from bridgekit.decoding.pyav import sound_track
from bridgekit.errors import ItemError
from bridgekit.items import Blob
from bridgekit.media import audio_seconds, read_audio
from tests.shared import compressed

CHORD = (440.0, 554.37, 659.25)
#: File name, encoder, sample rate, channels, and more options.
KINDS = [
    ("clip.m4a", "aac", 44_100, 2, {}),
    ("fast.m4a", "aac", 44_100, 1, {"movflags": "faststart"}),
    ("parts.mp4", "aac", 48_000, 1, {"movflags": "frag_keyframe+empty_moov", "frag_duration": "300000"}),
    ("lossless.m4a", "alac", 44_100, 2, {}),
    ("clip.aac", "aac", 22_050, 2, {"format": "adts"}),
    ("clip.webm", "libopus", 48_000, 1, {}),
    ("streamed.webm", "libopus", 48_000, 2, {"live": "1"}),
    ("clip.mka", "libopus", 48_000, 1, {}),
    ("flac.mkv", "flac", 44_100, 2, {}),
    ("wave.mov", "pcm_s24le", 44_100, 2, {}),
    ("bytes.mov", "pcm_u8", 16_000, 1, {}),
]


def chord(seconds: float, rate: int, channels: int = 1) -> NDArray[np.float32]:
    """Three notes at -14 dB each, of shape (channels, n)."""
    time = np.arange(round(seconds * rate)) / rate
    return np.tile(sum(0.2 * np.sin(2 * np.pi * note * time) for note in CHORD), (channels, 1)).astype(np.float32)


def notes(samples: NDArray[np.float32], rate: int) -> list[float]:
    """The three strongest frequencies in Hz, at least 50 Hz apart."""
    power, found = np.abs(np.fft.rfft(samples * np.hanning(len(samples)))), []
    frequencies = np.fft.rfftfreq(len(samples), 1 / rate)
    for _ in range(3):
        found.append(float(frequencies[power.argmax()]))
        power[np.abs(frequencies - found[-1]) < 50] = 0
    return sorted(found)


def refusal(path: Path) -> str:
    with pytest.raises(ItemError) as caught:
        read_audio(path, 16_000)
    assert caught.value.where == str(path)
    assert caught.value.remedy
    return caught.value.what


@pytest.fixture
def new_decoders() -> Iterator[None]:
    """Decoder processes that see this process's search path as it is now."""
    isolation._pool.close()
    yield
    isolation._pool.close()


@pytest.mark.parametrize(("name", "codec", "rate", "channels", "options"), KINDS, ids=[kind[0] for kind in KINDS])
def test_a_recording_is_read_at_its_length_and_loudness(
    tmp_path: Path, name: str, codec: str, rate: int, channels: int, options: dict[str, str]
) -> None:
    path = compressed(tmp_path / name, codec, chord(2.0, rate, channels), rate, **options)
    samples = read_audio(path, 16_000)
    assert samples.dtype == np.float32
    assert len(samples) == pytest.approx(
        32_000, abs=1_600
    )  # AAC comes in frames, and ADTS has no way to say where sound starts
    assert notes(samples[2_000:30_000], 16_000) == pytest.approx(CHORD, abs=1)
    assert samples[2_000:30_000].std() == pytest.approx(0.245, abs=0.01)
    assert audio_seconds(path, 60) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(("name", "codec", "rate", "channels", "options"), KINDS, ids=[kind[0] for kind in KINDS])
@pytest.mark.parametrize("share", [0.03, 0.3, 0.6, 0.96])
def test_a_recording_cut_short_is_refused(
    tmp_path: Path, name: str, codec: str, rate: int, channels: int, options: dict[str, str], share: float
) -> None:
    path = compressed(tmp_path / name, codec, chord(2.0, rate, channels), rate, **options)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert "cut short" in refusal(path)
    path.write_bytes(b"")
    assert "empty" in refusal(path)


@pytest.mark.parametrize(("name", "codec"), [("film.mp4", "aac"), ("film.webm", "libopus"), ("film.mkv", "aac")])
def test_of_a_video_the_sound_track_is_read(tmp_path: Path, name: str, codec: str) -> None:
    video = "libvpx" if name.endswith("webm") else "libx264"
    path = compressed(tmp_path / name, codec, chord(2.0, 48_000), 48_000, video=video)
    assert notes(read_audio(path, 16_000), 16_000) == pytest.approx(CHORD, abs=1)


def test_a_cover_picture_is_skipped(tmp_path: Path) -> None:
    path = compressed(tmp_path / "song.m4a", "aac", chord(2.0, 48_000), 48_000, format="mp4", cover="yes")
    assert b"covr" in path.read_bytes()
    assert notes(read_audio(path, 16_000), 16_000) == pytest.approx(CHORD, abs=1)


def test_a_file_without_a_sound_track_is_refused(tmp_path: Path) -> None:
    import av

    path = tmp_path / "silent film.mp4"
    with av.open(str(path), "w") as file:
        track = file.add_stream("libx264", rate=5)
        track.width, track.height, track.pix_fmt = 64, 48, "yuv420p"
        file.mux(track.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8))))
        file.mux(track.encode(None))
    assert refusal(path) == "the file has no sound track"


def test_a_tag_in_another_encoding_than_utf_8_does_not_matter(tmp_path: Path) -> None:
    path = compressed(tmp_path / "clip.m4a", "aac", chord(1.0, 48_000), 48_000)
    data = path.read_bytes()
    assert b"Lavf" in data
    path.write_bytes(data.replace(b"Lavf", b"L\xe4vf"))
    assert len(read_audio(path, 16_000)) == pytest.approx(16_000, abs=1_600)


def test_an_id3_tag_before_aac_is_skipped(tmp_path: Path) -> None:
    path = compressed(tmp_path / "clip.aac", "aac", chord(1.0, 48_000), 48_000, format="adts")
    path.write_bytes(b"ID3\x04\x00\x00\x00\x00\x00\x35" + bytes(0x35) + path.read_bytes())
    assert len(read_audio(path, 16_000)) == pytest.approx(16_000, abs=1_600)


def test_damage_that_the_decoder_notices_is_refused(tmp_path: Path) -> None:
    path = compressed(tmp_path / "clip.m4a", "aac", chord(2.0, 48_000), 48_000)
    data = bytearray(path.read_bytes())
    data[2_000:12_000] = np.random.default_rng(0).bytes(10_000)
    path.write_bytes(data)
    assert "damaged" in refusal(path)


def test_an_m4a_that_claims_to_last_for_five_hours_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = compressed(tmp_path / "claim.m4a", "aac", chord(2.0, 48_000), 48_000, use_editlist="0")
    data, longer = path.read_bytes(), 5 * 3600 // 2
    at = data.index(b"mdhd") + 20
    data = data[:at] + struct.pack(">I", 2 * 48_000 * longer) + data[at + 4 :]
    at = data.index(b"stts")
    for entry in range(struct.unpack(">I", data[at + 8 : at + 12])[0]):
        place = at + 16 + 8 * entry
        (samples,) = struct.unpack(">I", data[place : place + 4])
        data = data[:place] + struct.pack(">I", samples * longer) + data[place + 4 :]
    path.write_bytes(data)
    assert "over 4 hours, or claims to" in refusal(path)
    with pytest.raises(ItemError, match="4 hours"):
        next(decoders.decode_audio(path, 16_000))


def test_a_webm_that_claims_to_last_for_five_hours_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = compressed(tmp_path / "claim.webm", "libopus", chord(2.0, 48_000), 48_000)
    data = path.read_bytes()
    at = data.index(b"\x44\x89\x88") + 3  # the element Duration, of 8 bytes
    path.write_bytes(data[:at] + struct.pack(">d", 5 * 3600 * 1000.0) + data[at + 8 :])
    assert "over 4 hours, or claims to" in refusal(path)


def test_a_recording_of_unknown_length_is_read_up_to_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = compressed(tmp_path / "live.webm", "libopus", chord(8.0, 48_000), 48_000, live="1")
    monkeypatch.setattr(decoders, "MAX_HOURS", 1 / 3600)
    with pytest.raises(ItemError, match="lasts over"):
        list(decoders.decode_audio(path, 16_000))


def test_samples_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    samples = chord(0.5, 16_000)
    samples[0, 700] = np.nan
    path = compressed(tmp_path / "nan.mov", "pcm_f32le", samples, 16_000)
    assert "not finite" in refusal(path)


def test_a_rate_that_changes_on_the_way_is_refused(tmp_path: Path) -> None:
    parts = [
        compressed(tmp_path / f"{rate}.aac", "aac", chord(1.0, rate), rate, format="adts").read_bytes()
        for rate in (48_000, 32_000)
    ]
    path = tmp_path / "both.aac"
    path.write_bytes(b"".join(parts))
    assert "sample rate changes from 48,000 to 32,000 Hz" in refusal(path)


def test_a_file_in_memory_is_read(tmp_path: Path) -> None:
    data = compressed(tmp_path / "clip.webm", "libopus", chord(1.0, 48_000), 48_000).read_bytes()
    with sound_track(io.BytesIO(data), "matroska", "shard.tar/clip.webm") as (rate, promised, blocks):
        samples = np.concatenate(list(blocks))
    assert (rate, len(samples)) == (48_000, 48_000)
    assert promised == pytest.approx(48_000, abs=1_000)
    blob = Blob("shard.tar/clip.webm", lambda: data)
    assert len(read_audio(blob, 16_000)) == 16_000
    with pytest.raises(ItemError, match="cut short") as caught:
        read_audio(Blob("shard.tar/clip.webm", lambda: data[:1_000]), 16_000)
    assert caught.value.where == "shard.tar/clip.webm"


def test_decoding_takes_one_thread_and_fits_the_memory_cap(tmp_path: Path, new_decoders: None) -> None:
    path = compressed(tmp_path / "film.mp4", "aac", chord(2.0, 48_000), 48_000, video="libx264")
    read_audio(path, 16_000)
    (decoder,) = isolation.decoder_ids()
    try:
        status = dict(line.split(":\t") for line in Path(f"/proc/{decoder}/status").read_text(encoding="ascii").splitlines())
    except OSError:
        pytest.skip("this system has no /proc")
    assert int(status["Threads"]) == 1
    assert int(status["VmPeak"].split()[0]) * 1024 < isolation.MEMORY_CAP / 4


@pytest.mark.parametrize("name", ["clip.m4a", "clip.aac", "clip.webm"])
def test_without_pyav_the_message_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_decoders: None, name: str
) -> None:
    options = {"format": "adts"} if name.endswith("aac") else {}
    path = compressed(tmp_path / name, "libopus" if name.endswith("webm") else "aac", chord(1.0, 48_000), 48_000, **options)
    (tmp_path / "without").mkdir()
    missing = 'raise ModuleNotFoundError("No module named \'av\'", name="av")'
    (tmp_path / "without" / "av.py").write_text(missing, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "without")
    with pytest.raises(ItemError) as caught:
        read_audio(path, 16_000)
    assert str(caught.value) == (
        "MP4, AAC, WebM and Matroska are read by PyAV, which is not installed\n"
        f"  in: {path}\n"
        '  fix: in bridgekit\'s own folder: pip install ".[media]"; '
        "or convert it to WAV, FLAC, Ogg or MP3 (ffmpeg -i IN OUT.flac)"
    )
