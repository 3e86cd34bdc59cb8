"""`bridgekit plugins`."""

from __future__ import annotations

from typing import Annotated

import typer

from bridgekit.cli.common import print_json
from bridgekit.plugins import installed_plugins


def command(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False) -> None:
    """What is installed, what each plugin brings, and why one failed.

    Example: [b]bridgekit plugins[/b]
    """
    found = installed_plugins()
    if as_json:
        print_json(
            [
                {
                    "name": plugin.name,
                    "package": plugin.package,
                    "encoders": [
                        {"model": f"{provider.name}:{model}", "modalities": list(provider.modalities)}
                        for provider in plugin.providers
                        for model in provider.models()
                    ],
                    "defaults": {
                        modality: f"{provider.name}:{model}"
                        for provider in plugin.providers
                        for modality, model in provider.defaults.items()
                    },
                    "sources": [{"name": source.name, "description": source.description} for source in plugin.sources],
                    "image_generators": [
                        {"name": generator.name, "description": generator.description} for generator in plugin.generators
                    ],
                    "problem": plugin.problem,
                }
                for plugin in found
            ]
        )
        return
    if not found:
        print("No plugin is installed. Start with: pip install bridgekit-starter")
    for plugin in found:
        print(f"{plugin.name} ({plugin.package})")
        for provider in plugin.providers:
            defaults = {model: modality for modality, model in provider.defaults.items()}
            print(f"  encoders for {', '.join(provider.modalities)}:")
            for model in provider.models():
                print(f"    {provider.name}:{model}" + (f"  (default for {defaults[model]})" if model in defaults else ""))
        for source in plugin.sources:
            print(f"  pairs {source.name}: {source.description}")
        for generator in plugin.generators:
            print(f"  pictures by {generator.name}: {generator.description}")
        if plugin.problem:
            print(f"  PROBLEM: {plugin.problem}")
