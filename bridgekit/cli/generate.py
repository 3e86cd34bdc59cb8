"""`bridgekit generate`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from bridgekit.cli.common import BridgeOption, Columns, Device, Json, Outside, newest_bridge, parse_columns
from bridgekit.encoders import Item
from bridgekit.errors import BridgekitError
from bridgekit.terminal import print_json, say


def command(
    audio: Annotated[list[str] | None, typer.Option(help="A clip, or a folder or table of clips for one image each.")] = None,
    image: Annotated[list[str] | None, typer.Option(help="An image, folder or table, if the bridge has images.")] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Text to condition on, through the bridge; or a table or .txt file.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Weights of mixed inputs, such as 2,1: audio, image, then text.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Text prompt for the model itself, for example for the style.")] = None,
    prompt_weight: Annotated[float, typer.Option(min=0, max=1, help="Weight of the prompt relative to the inputs.")] = 0.3,
    bridge: BridgeOption = None,
    model: Annotated[
        str | None, typer.Option(help="A plugin's model, diffusers folder or hub id. [dim]default: starter:openmoji-64[/dim]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A .png or a folder. [dim]default: named after the input[/dim]")] = None,
    n: Annotated[int, typer.Option("-n", "--n", min=1, help="Images per input, with consecutive seeds.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Seed of the first image.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps. [dim]default: the model's[/dim]")] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="Guidance scale, 1 for none. [dim]default: the model's[/dim]")
    ] = None,
    size: Annotated[int | None, typer.Option(min=8, max=4096, help="Side in pixels. [dim]default: the model's[/dim]")] = None,
    gap: Annotated[str, typer.Option(help="How to close the modality gap: captions, mean or none.")] = "captions",
    captions: Annotated[
        Path | None, typer.Option(help="Table or .txt to fit the conditioner on. [dim]default: the bridge's own captions[/dim]")
    ] = None,
    refit: Annotated[bool, typer.Option("--refit", help="Fit the conditioner again.")] = False,
    device: Device = "auto",
    outside: Outside = False,
    column: Columns = None,
    as_json: Json = False,
) -> None:
    """Generate images from audio, images or text with a text-to-image model.

    Example: [b]bridgekit generate --audio clip.wav[/b]
    """
    items = {"audio": audio or [], "image": image or [], "text": text or []}
    modalities = {modality for modality, each in items.items() if each}
    if not modalities:
        raise BridgekitError("no input given", remedy="give --audio clip.wav, --image or --text")
    folder = bridge or newest_bridge(modalities)
    if folder is None:
        what = f"there is no bridge for {' and '.join(sorted(modalities))} in ./bridges"
        raise BridgekitError(what, remedy="train one (bridgekit align) or give its folder with --bridge")
    from bridgekit.recipes.generate import Input, generate

    columns = parse_columns(column)
    shares = _weights(weights, sum(map(len, items.values())))
    inputs = [
        Input(modality, _texts(item, columns, outside) if modality == "text" else item, shares.pop(0))
        for modality, each in items.items()
        for item in each
    ]
    done = generate(
        folder,
        inputs,
        model=model,
        prompt=prompt,
        prompt_weight=prompt_weight,
        gap=gap,
        n=n,
        seed=seed,
        steps=steps,
        guidance=guidance,
        size=size,
        captions=captions,
        refit=refit,
        out=out,
        device=device,
        outside=outside,
        columns=columns,
    )
    if as_json:
        print_json(
            {
                "bridge": str(folder),
                "pictures": [
                    {
                        "file": str(made.file),
                        "inputs": list(made.inputs),
                        "seed": made.seed,
                        **asdict(made.heard),
                        "nearest": [{"item": hit.item, "similarity": round(hit.similarity, 6)} for hit in made.nearest],
                    }
                    for made in done.pictures
                ],
                "sheet": str(done.sheet) if done.sheet else None,
                "set_aside": [{"item": item, "reason": reason} for item, reason in done.set_aside.items()],
                "conditioner": {"items": len(done.conditioner.items), "cosine": done.conditioner.cosine, "fitted": done.fitted},
            }
        )
        return
    for item, reason in done.set_aside.items():
        say(f"set aside: {item[:200]}: {reason}", sys.stderr)
    if done.fitted and done.conditioner.net is not None:
        kept = folder / "conditioners"
        say(
            f"Fitted a conditioner on {len(done.conditioner.items):,} captions; it reproduces their conditioning with a cosine "
            f"of {done.conditioner.cosine:.3f}. " + (f"Saved in {kept}." if kept.is_dir() else f"{kept} cannot be written.")
        )
    for made in done.pictures:
        nearest = ", ".join(f"{hit.item} ({hit.similarity:.2f})" for hit in made.nearest)
        speech = made.heard.speech
        heard = "" if speech is None else "speech, " if speech > 0.5 else "a sound, "
        unsure = "not sure, " if made.heard.sure is False else ""
        say(f"{made.file}: {heard}{unsure}nearest captions: {nearest}" if nearest else made.file)
    if done.sheet:
        say(f"Contact sheet: {done.sheet}")


def _texts(argument: str, columns: Mapping[str, str], outside: bool) -> Item | Sequence[Item]:
    """The text that an argument is, or the texts in a table or file. Only here: in Python, a text is never a path."""
    from bridgekit.recipes.inputs import is_listing, list_items

    found = list_items(argument, "text", columns=columns, outside=outside).items
    return found if is_listing(argument, "text") else found[0]


def _weights(text: str | None, inputs: int) -> list[float]:
    try:
        shares = [float(part) for part in text.split(",")] if text else [1.0] * inputs
    except ValueError:
        shares = []
    if len(shares) != inputs:
        raise BridgekitError(f"--weights {text} does not match {inputs} inputs", remedy="give one number per input, as in 2,1")
    return shares
