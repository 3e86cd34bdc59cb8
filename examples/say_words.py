"""Speak words into WAV files in a voice held out of training: python say_words.py penguin "red apple" """

from __future__ import annotations

import sys

import soundfile
from bridgekit_starter.voice import speak


def main(words: list[str]) -> None:
    """Write one file per word."""
    for word in words:
        samples, rate = speak(word, "en-gb-x-gbclan+steph", rate=165)
        name = f"{word.replace(' ', '_')}.wav"
        soundfile.write(name, samples, rate)
        print(f"{name}: {len(samples) / rate:.1f} s")


if __name__ == "__main__":
    main(sys.argv[1:] or ["penguin", "red apple", "fire engine"])
