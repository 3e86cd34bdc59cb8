"""Speak words and generate images of them: python say_it_see_it.py penguin "red apple" "fire engine"

Needs the starter's bridge (`bridgekit align --a audio --b text`). The voice is held out of training.
"""

from __future__ import annotations

import sys
from pathlib import Path

import soundfile
from bridgekit_starter.voice import speak

from bridgekit import Input, generate


def main(words: list[str]) -> None:
    """Speak each word into a clip; generate an image for each clip, and a contact sheet."""
    clips = Path("said")
    clips.mkdir(exist_ok=True)
    for word in words:
        samples, rate = speak(word, "en-gb-x-gbclan+steph", rate=165)
        soundfile.write(clips / f"{word}.wav", samples, rate)
    inputs = [Input("audio", clips)] if len(words) > 1 else [Input("audio", clips / f"{words[0]}.wav")]
    done = generate("bridges/audio-text", inputs, out="seen")
    for made in done.pictures:
        print(f"{made.file}: nearest caption {made.nearest[0].item}")
    print(f"contact sheet: {done.sheet}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["penguin", "red apple", "fire engine", "snowman", "guitar", "rainbow"])
