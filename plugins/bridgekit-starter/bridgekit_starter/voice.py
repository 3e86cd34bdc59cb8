"""Deterministic text to speech with eSpeak NG, from the package espeakng-loader."""

from __future__ import annotations

import ctypes
import threading
from typing import TYPE_CHECKING

from bridgekit.errors import BridgekitError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# From espeak-ng/speak_lib.h.
SYNCHRONOUS = 2  # espeak_Synth calls back in the calling thread and returns after the last sample
DO_NOT_EXIT = 0x8000  # return an error if data files are missing, instead of exiting the process
UTF8 = 1
RATE, PITCH, RANGE = 1, 3, 4

TakeSamples = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

# The library keeps its state in global variables.
_one_at_a_time = threading.Lock()


def speak(text: str, voice: str, *, rate: int = 175, pitch: int = 50, pitch_range: int = 50) -> tuple[NDArray[np.int16], int]:
    """Synthesise a text.

    The library is loaded for each call, which takes about a millisecond. eSpeak varies the pitch from a table and keeps its
    position in the table between calls, with no way to reset it. If the library stayed loaded, a clip would depend on all
    clips before it.

    Arguments:
        text: the text.
        voice: an eSpeak language, optionally with a variant: `en-us`, `en-gb-x-rp+f2`.
        rate: words per minute, 80 to 450.
        pitch: 0 to 100.
        pitch_range: 0 (monotone) to 100.

    Returns:
        Samples of shape (n,), and the sample rate (22,050).

    Raises:
        BridgekitError: eSpeak cannot be started, does not have the voice, or cannot speak the text.
    """
    import numpy as np

    with _one_at_a_time:
        library = _load()
        try:
            samples, samples_a_second = _synthesise(library, text, voice, rate, pitch, pitch_range)
        finally:
            _unload(library)
    return np.frombuffer(samples, dtype=np.int16), samples_a_second


def _synthesise(library: ctypes.CDLL, text: str, voice: str, rate: int, pitch: int, pitch_range: int) -> tuple[bytes, int]:
    import espeakng_loader

    data = espeakng_loader.get_data_path()
    samples_a_second = library.espeak_Initialize(SYNCHRONOUS, 0, data.encode(), DO_NOT_EXIT)
    if samples_a_second <= 0:
        remedy = "reinstall espeakng-loader; if that path has over 150 characters, use a virtual environment with a shorter one"
        raise BridgekitError("eSpeak NG cannot read its data", where=data, remedy=remedy)
    pieces: list[bytes] = []

    def take(samples: ctypes._Pointer[ctypes.c_short], count: int, _: object) -> int:
        if samples and count > 0:
            pieces.append(ctypes.string_at(samples, 2 * count))
        return 0  # go on

    taker = TakeSamples(take)  # keep a reference: the library does not
    library.espeak_SetSynthCallback(taker)
    library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # of the breath noise; the default is the time
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise BridgekitError("eSpeak NG has no such voice", where=voice, remedy="use a language and a variant, e.g. en-us+f2")
    for parameter, value in ((RATE, rate), (PITCH, pitch), (RANGE, pitch_range)):
        library.espeak_SetParameter(parameter, value, 0)
    letters = text.encode() + b"\0"
    if library.espeak_Synth(letters, ctypes.c_size_t(len(letters)), 0, 1, 0, UTF8, None, None) != 0 or not pieces:
        raise BridgekitError("eSpeak NG cannot speak this text", where=text)
    return b"".join(pieces), samples_a_second


def _load() -> ctypes.CDLL:
    import espeakng_loader

    path = espeakng_loader.get_library_path()
    try:
        return ctypes.CDLL(path)
    except OSError as error:
        raise BridgekitError(f"eSpeak NG cannot be loaded: {error}", where=path, remedy="reinstall espeakng-loader") from error


def _unload(library: ctypes.CDLL) -> None:
    """Terminate eSpeak and unload the library with its global state."""
    import _ctypes

    library.espeak_Terminate()
    _ctypes.dlclose(library._handle)
