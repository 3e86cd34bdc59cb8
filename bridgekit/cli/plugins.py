"""`bridgekit plugins` and `bridgekit plugins new`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bridgekit.cli.common import Json
from bridgekit.hookspecs import EncoderProvider
from bridgekit.plugins import INSTALL, Plugin, installed_plugins
from bridgekit.terminal import print_json, say

app = typer.Typer(invoke_without_command=True)


@app.callback()
def command(context: typer.Context, as_json: Json = False) -> None:
    """List installed plugins with their encoders, sources and models, and any errors.

    Example: [b]bridgekit plugins[/b]
    """
    if context.invoked_subcommand:
        return
    found = [(plugin, *_models(plugin)) for plugin in installed_plugins()]
    if as_json:
        print_json(
            [
                {
                    "name": plugin.name,
                    "package": plugin.package,
                    "encoders": [
                        {"model": f"{provider.name}:{model}", "modalities": list(provider.modalities)}
                        for provider, names in models
                        for model in names
                    ],
                    "defaults": {
                        modality: f"{provider.name}:{model}"
                        for provider in plugin.providers
                        for modality, model in provider.defaults.items()
                    },
                    "sources": [{"name": source.name, "description": source.description} for source in plugin.sources],
                    "pair_providers": [{"name": table.name, "description": table.description} for table in plugin.tables],
                    "image_generators": [
                        {"name": generator.name, "description": generator.description} for generator in plugin.generators
                    ],
                    "problem": problem,
                }
                for plugin, models, problem in found
            ]
        )
        return
    if not found:
        say(f"No plugin is installed. Start with one, {INSTALL.format('starter')}")
    for plugin, models, problem in found:
        say(f"{plugin.name} ({plugin.package})")
        for provider, names in models:
            defaults = {model: modality for modality, model in provider.defaults.items()}
            say(f"  encoders for {', '.join(provider.modalities)}:")
            for model in names:
                say(f"    {provider.name}:{model}" + (f"  (default for {defaults[model]})" if model in defaults else ""))
        for source in plugin.sources:
            say(f"  pairs {source.name}: {source.description}")
        for table in plugin.tables:
            say(f"  pairs {table.name}:...: {table.description}")
        for generator in plugin.generators:
            say(f"  text-to-image {generator.name}: {generator.description}")
        if problem:
            say(f"  PROBLEM: {problem}")


def _models(plugin: Plugin) -> tuple[list[tuple[EncoderProvider, list[str]]], str | None]:
    """Each provider with its model names, and the plugin's problem, including failures of `models()`."""
    named: list[tuple[EncoderProvider, list[str]]] = []
    problems = [plugin.problem] if plugin.problem else []
    for provider in plugin.providers:
        names: list[str] = []
        try:
            names += provider.models()
        except Exception as error:  # third-party code
            problems.append(f"models() of {provider.name!r} failed: {type(error).__name__}: {error}")
        named.append((provider, names))
    return named, "; ".join(problems) or None


@app.command("new")
def new(
    name: Annotated[str, typer.Argument(help="Package name, such as [b]bridgekit-demo[/b] or [b]demo[/b].")],
    modality: Annotated[
        str | None,
        typer.Option(help="What its encoder is for: audio, image or text. Without it, for a modality of its own."),
    ] = None,
) -> None:
    """Create a working plugin in a new folder, as a starting point for your own.

    Example: [b]bridgekit plugins new bridgekit-demo --modality image[/b]
    """
    from bridgekit.recipes.new_plugin import create_plugin

    written = create_plugin(name, Path(), modality)
    folder, module = written[0].parent, next(path for path in written if path.suffix == ".py")
    say(f"Created: {', '.join(map(str, written))}")
    say(f"Next:    pip install -e ./{folder} && bridgekit plugins")
    say(f'Then:    edit the parts marked "Yours" in {module}; test with: pytest {folder}')
