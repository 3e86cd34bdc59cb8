"""`bridgekit info`."""

from __future__ import annotations

from bridgekit.cli.common import BridgeArgument, Json, find_bridge, print_metrics
from bridgekit.terminal import print_json, say


def command(bridge: BridgeArgument = None, as_json: Json = False) -> None:
    """Show a bridge's encoders, provenance and metrics.

    Example: [b]bridgekit info bridges/audio-text[/b]
    """
    from dataclasses import asdict

    from bridgekit.bridge.bridge import Bridge
    from bridgekit.bridge.provenance import provenance_text

    folder = find_bridge(bridge)
    opened = Bridge.load(folder, "cpu")
    if as_json:
        sides = {modality: asdict(side) for modality, side in opened.sides.items()}
        print_json(
            {
                "bridge": str(folder),
                "dim": opened.dim,
                "temperature": opened.temperature,
                "sides": sides,
                "preset": asdict(opened.preset),
                "provenance": dict(opened.provenance),
                "metrics": list(opened.metrics),
            }
        )
        return
    say(f"{folder}: {' and '.join(opened.sides)} in {opened.dim} dimensions, temperature {opened.temperature:.4f}")
    for modality, side in opened.sides.items():
        say(f"  {modality}: {side.encoder}, {side.dim} wide{', frozen' if side.frozen else ''} ({side.revision})")
    for name, value in provenance_text(opened.provenance).items():
        say(f"  {name}: {value}")
    for bound in opened.provenance.get("bound", ()):
        say(f"  bound later: {bound['modality']}")
        for name, value in provenance_text(bound).items():
            say(f"    {name}: {value}")
    if opened.metrics:
        print_metrics(opened.metrics, "Recall@k on held-out rows, in %", opened)
