"""Finds plugins by entry point, reports faulty ones, and resolves `provider:model` and `provider:source` names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from bridgekit import hookspecs
from bridgekit.encoders import Concatenated, Encoder, is_modality
from bridgekit.errors import BridgekitError, PluginError
from bridgekit.hookspecs import EncoderProvider, ImageGenerator, PairProvider, PairSource, SearchIndex
from bridgekit.progress import say

if TYPE_CHECKING:
    import typer

GROUP = "bridgekit"
#: Each hook that returns a list: its name, the field of `Plugin` for it, and the type and name of its elements.
HOOKS = (
    ("encoder_providers", "providers", EncoderProvider, "encoder provider"),
    ("pair_sources", "sources", PairSource, "pair source"),
    ("pair_providers", "tables", PairProvider, "pair provider"),
    ("image_generators", "generators", ImageGenerator, "text-to-image model"),
)
#: Our own plugins without a command. Their packages are named `bridgekit-NAME`, their encoder providers NAME.
OURS = ("clap", "datasets", "ray", "starter", "timm", "transformers")
#: The commands of our own plugins, whose packages are named likewise, with the help shown while they are not installed.
VERBS = {
    "app": "Serve a web page for search and image generation, and an HTTP API, on this machine.",
    "index": "Embed items and store them in an index for bridgekit search --index.",
    "subset": "Choose k training pairs, diverse or at random. Rows of other splits are kept.",
}
#: Libraries whose models other providers open, and how these name them.
NAMED_ELSEWHERE = {
    "open_clip": "name it transformers:ORG/MODEL,modality=text (or image), or its image tower as timm does: timm:MODEL",
    "sentence_transformers": "name it transformers:ORG/MODEL, as in transformers:sentence-transformers/all-MiniLM-L6-v2",
}
#: The provider of concatenations: `concat:NAME+NAME`.
CONCAT = "concat"
#: How to install one of our plugins. Not from PyPI, where the name may be someone else's.
INSTALL = "in bridgekit's own folder: pip install plugins/bridgekit-{}"


@dataclass(frozen=True)
class Plugin:
    """An installed plugin, and what it provides.

    Arguments:
        name: the entry point's name.
        package: the distribution and its version, for example `bridgekit-starter 0.1.0`.
        providers: its encoder providers.
        sources: its named tables of pairs.
        tables: its providers of tables of pairs.
        generators: its named text-to-image models.
        problem: what is wrong with it, in one line, or None. The rest of it may still be usable.
    """

    name: str
    package: str
    providers: tuple[EncoderProvider, ...] = ()
    sources: tuple[PairSource, ...] = ()
    tables: tuple[PairProvider, ...] = ()
    generators: tuple[ImageGenerator, ...] = ()
    problem: str | None = None


@cache
def _loaded() -> tuple[pluggy.PluginManager, tuple[Plugin, ...]]:
    """Import every plugin once. What it provides is queried later, so that `--help` stays fast."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    found: list[Plugin] = []
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        package = f"{point.dist.name} {point.dist.version}" if point.dist else point.value
        problem = None
        try:
            manager.register(point.load(), name=point.name)
        except (Exception, SystemExit) as error:  # a module may raise anything at import
            problem = f"cannot be loaded: {type(error).__name__}: {error}"
        found.append(Plugin(point.name, package, problem=problem))
    return manager, tuple(found)


@cache
def installed_plugins() -> tuple[Plugin, ...]:
    """All installed plugins, including faulty ones, which do not affect the others."""
    manager, loaded = _loaded()
    plugins = [plugin if plugin.problem else _with_contents(plugin, manager) for plugin in loaded]
    return tuple(_without_clashes(plugin, [other for other in plugins if other is not plugin]) for plugin in plugins)


def forget_plugins() -> None:
    """Discover plugins again at the next call: for tests, or after an installation in the same process."""
    _loaded.cache_clear()
    installed_plugins.cache_clear()


def _with_contents(plugin: Plugin, manager: pluggy.PluginManager) -> Plugin:
    """The plugin with what its hooks return, and any problems with it."""
    contents: dict[str, Any] = {}
    problems: list[str] = []
    for hook, field, kind, _ in HOOKS:
        contents[field] = ()
        for implementation in getattr(manager.hook, hook).get_hookimpls():
            if implementation.plugin_name == plugin.name:
                try:
                    returned = tuple(implementation.function())
                except Exception as error:
                    problems.append(f"{hook}() failed: {type(error).__name__}: {error}")
                    continue
                contents[field] += tuple(thing for thing in returned if isinstance(thing, kind))
                if not all(isinstance(thing, kind) for thing in returned):
                    problems.append(f"{hook}() must return a list of {kind.__name__}")
    return replace(plugin, **contents, problem="; ".join(problems) or None)


def _without_clashes(plugin: Plugin, others: Sequence[Plugin]) -> Plugin:
    """The plugin without names that another one uses too. Neither gets the name, as the choice would be arbitrary."""
    contents: dict[str, Any] = {}
    problems = [plugin.problem] if plugin.problem else []
    for _, field, _, what in HOOKS:
        taken = {thing.name: other.package for other in others for thing in getattr(other, field)}
        things = getattr(plugin, field)
        contents[field] = tuple(thing for thing in things if thing.name not in taken)
        for name in dict.fromkeys(thing.name for thing in things if thing.name in taken):
            problems.append(f"its {what} {name!r} cannot be used, as {taken[name]} has one with the same name")
    return replace(plugin, **contents, problem="; ".join(problems) or None)


def register_commands(app: typer.Typer) -> None:
    """Let each plugin add its commands."""
    for implementation in _loaded()[0].hook.register_commands.get_hookimpls():
        try:
            implementation.function(app=app)
        except Exception as error:
            say(f"the plugin {implementation.plugin_name!r} failed to add its commands: {error}")


def open_index(path: str) -> SearchIndex:
    """The index at a path or URL, opened by a plugin.

    Raises:
        BridgekitError: no plugin can open it.
    """
    found: SearchIndex | None = _loaded()[0].hook.open_index(path=path)
    if found is None:
        raise not_installed("index")
    return found


def bundled_bridge() -> Path | None:
    """The folder of the bridge that comes with a plugin, or None."""
    found: Path | None = _loaded()[0].hook.bundled_bridge()
    return found


def ours(package: str, name: str) -> Any:
    """A name from the module of one of our own plugins.

    Raises:
        BridgekitError: the plugin is not installed, or does not work.
    """
    module = _loaded()[0].get_plugin(package)
    if module is None:
        raise not_installed(package)
    return getattr(module, name)


def not_installed(package: str) -> BridgekitError:
    """The error for one of our own plugins that is not installed, or does not work."""
    for plugin in _loaded()[1]:
        if plugin.name == package and plugin.problem:
            return _does_not_work(plugin)
    return BridgekitError(f"the package bridgekit-{package} is not installed", remedy=INSTALL.format(package))


def _does_not_work(plugin: Plugin, where: str | None = None) -> PluginError:
    remedy = "install another version of it, or uninstall it (see: bridgekit plugins)"
    return PluginError(f"the plugin {plugin.package} does not work: {plugin.problem}", where=where, remedy=remedy)


def _closest(name: str, known: Iterable[str], what: str, none: str) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"{what}: {', '.join(names)}" if names else none


def find_pair_source(name: str) -> PairSource:
    """A plugin's table of pairs, by name: one of its sources, or what one of its providers opens.

    Raises:
        BridgekitError: no plugin has it.
    """
    sources = {source.name: source for plugin in installed_plugins() for source in plugin.sources}
    if name in sources:
        return sources[name]
    provider, _, table = name.partition(":")
    providers = pair_providers()
    if provider in providers:
        found = providers[provider]
        return PairSource(name, found.description, (), partial(found.open, table))
    if provider in ("datasets", "webdataset"):
        raise not_installed("datasets")
    raise BridgekitError(
        f"there is no pair source {name!r}",
        where=name,
        remedy=_closest(name, sources, "use a path or one of", "give the path of a table"),
    )


def pair_providers() -> dict[str, PairProvider]:
    """The providers of tables of pairs, by name."""
    return {provider.name: provider for plugin in installed_plugins() for provider in plugin.tables}


def find_image_generator(name: str | None) -> ImageGenerator | None:
    """A plugin's text-to-image model by name, or the first one for None; None if there is none."""
    generators = {generator.name: generator for plugin in installed_plugins() for generator in plugin.generators}
    return next(iter(generators.values()), None) if name is None else generators.get(name)


def default_pair_source(modalities: Iterable[str]) -> PairSource:
    """The table of some plugin that is the default for these modalities.

    Raises:
        BridgekitError: there is none, or more than one.
    """
    wanted = set(modalities)
    fitting = [source for plugin in installed_plugins() for source in plugin.sources if set(source.modalities) == wanted]
    chosen = [source for source in fitting if source.default] or fitting
    if len(chosen) == 1:
        return chosen[0]
    names = f", or one of {', '.join(source.name for source in fitting)}" if fitting else ""
    raise BridgekitError(
        f"which pairs of {' and '.join(sorted(wanted))}?",
        remedy=f"give --pairs: a table (CSV, JSON, Parquet, ...), a folder of files or tables{names}",
    )


def default_modalities() -> set[str]:
    """The modalities for which a plugin offers a default encoder."""
    return {modality for plugin in installed_plugins() for provider in plugin.providers for modality in provider.defaults}


def encoder_name(name: str) -> str:
    """`provider:model`: what the user gave, or the default encoder if that is a modality.

    Raises:
        BridgekitError: no plugin, or more than one, has a default for the modality, or the name lacks a provider.
    """
    if ":" in name:
        return name
    if "/" in name:
        raise _without_provider(name)
    offers = [
        f"{provider.name}:{provider.defaults[name]}"
        for plugin in installed_plugins()
        for provider in plugin.providers
        if name in provider.defaults
    ]
    if len(offers) == 1:
        return offers[0]
    if offers:
        raise BridgekitError(f"several plugins offer a default encoder for {name!r}", remedy=f"name one: {', '.join(offers)}")
    remedy = _closest(name, default_modalities(), "modalities", f"install one, {INSTALL.format('starter')}")
    raise BridgekitError(
        f"no installed plugin has an encoder for the modality {name!r}", remedy=f"{remedy} (see: bridgekit plugins)"
    )


def known_modality(name: str) -> str | None:
    """The modality of an encoder, if it can be told without opening it: for a default, and where a provider has only one.

    Arguments:
        name: a modality, or `provider:model`.
    """
    provider_name, colon, model = name.partition(":")
    if not colon:
        return name if name in default_modalities() else None
    for provider in (each for plugin in installed_plugins() for each in plugin.providers if each.name == provider_name):
        if len(provider.modalities) == 1:
            return provider.modalities[0]
        return next((modality for modality, default in provider.defaults.items() if default == model), None)
    return None


def _without_provider(name: str) -> BridgekitError:
    """The error for a hub id or a folder that is given as an encoder."""
    provider, model = ("timm", name[5:]) if name.startswith("timm/") else ("transformers", name)
    remedy = f"name it {provider}:{model}"
    if not any(each.name == provider for plugin in installed_plugins() for each in plugin.providers):
        remedy += f", and install the package bridgekit-{provider}, {INSTALL.format(provider)}"
    return BridgekitError("an encoder is named provider:model, and this has no provider", where=name, remedy=remedy)


def load_encoder(name: str, device: str = "auto", revision: str | None = None) -> Encoder:
    """Open a frozen encoder.

    Arguments:
        name: `provider:model`, for example `timm:resnet50`, or a modality for its default encoder. `concat:NAME+NAME`
            concatenates encoders of one modality.
        device: a torch device, or `auto`.
        revision: the revision that a bridge records, in case the name has another meaning now.

    Raises:
        PluginError: the plugin is missing, fails, or returns something that is not an encoder. The message names it.
    """
    from bridgekit.hardware import resolve_device  # imports torch, which `--help` must not

    full = encoder_name(name)
    provider_name, model = full.split(":", 1)
    if provider_name == CONCAT:
        return concatenated([(part, load_encoder(part, device)) for part in _concatenated_names(model)])
    owners = {provider.name: (plugin, provider) for plugin in installed_plugins() for provider in plugin.providers}
    if provider_name not in owners:
        for broken in installed_plugins():
            if broken.problem and (broken.name == provider_name or f"encoder provider {provider_name!r}" in broken.problem):
                raise _does_not_work(broken, full)
        near = _closest(provider_name, owners, "use one of", "see bridgekit plugins")
        package = INSTALL.format(provider_name) if provider_name in OURS else "install the plugin that provides it"
        if provider_name == "clap":
            package += " in an environment of its own (it needs numpy below 2)"
        remedy = NAMED_ELSEWHERE.get(provider_name.replace("-", "_"), f"{package}, or {near}")
        raise PluginError(f"no installed plugin provides {provider_name!r}", where=full, remedy=remedy)
    plugin, provider = owners[provider_name]
    try:
        encoder = provider.open(provider.renamed.get(revision or "", model), resolve_device(device))
    except BridgekitError:
        raise
    except Exception as error:
        raise PluginError(f"the plugin {plugin.package} cannot open {full}: {type(error).__name__}: {error}") from error
    _check_contract(encoder, full, plugin.package)
    return encoder


def concatenated(encoders: Sequence[tuple[str, Encoder]]) -> Concatenated:
    """Encoders of one modality, each with its full name, as one, whose `pinned` name `load_encoder` opens.

    Raises:
        BridgekitError: fewer than two encoders, of different modalities, or names that cannot be told apart once joined.
    """
    names = [recorded_name(name, encoder) for name, encoder in encoders]
    whole = Concatenated(names, [encoder for _, encoder in encoders])
    if _concatenated_names(whole.pinned.partition(":")[2]) != names:
        raise BridgekitError(
            "these encoders cannot be concatenated: a name has the beginning of another one in it",
            where=whole.pinned,
            remedy="use names without a + before the name of a provider",
        )
    return whole


def _concatenated_names(joined: str) -> list[str]:
    """The names in `NAME+NAME`. They may contain a + that no installed provider and colon follow, as in `layers=3+last`."""
    providers = [provider.name for plugin in installed_plugins() for provider in plugin.providers]
    return re.split(rf"\+(?=(?:{'|'.join(map(re.escape, providers))}):)", joined)


def recorded_name(name: str, encoder: Encoder) -> str:
    """The name that a bridge records for an encoder: its `pinned` one if it has one, else `name`, which it was opened by.

    Raises:
        PluginError: the pinned name belongs to another provider.
    """
    pinned = getattr(encoder, "pinned", name)
    if not isinstance(pinned, str) or pinned.partition(":")[0] != name.partition(":")[0]:
        raise PluginError(f"{plugin_of(encoder)} returned an encoder whose `pinned` name is not its provider's", where=name)
    return pinned


def plugin_of(encoder: Encoder) -> str:
    """`the plugin PACKAGE VERSION` that an encoder comes from, or its module if no entry point names it."""
    module = type(encoder).__module__.partition(".")[0]
    for point in entry_points(group=GROUP):
        if point.dist and point.value.partition(":")[0].partition(".")[0] == module:
            return f"the plugin {point.dist.name} {point.dist.version}"
    return f"the plugin {module}"


def _check_contract(encoder: object, name: str, package: str) -> None:
    expected: dict[str, Callable[[Any], bool]] = {
        "modality": is_modality,
        "dim": lambda value: isinstance(value, int) and value > 0,
        "revision": lambda value: isinstance(value, str) and bool(value),
        "prepare": callable,
        "encode": callable,
    }
    invalid = [f"`{attribute}`" for attribute, good in expected.items() if not good(getattr(encoder, attribute, None))]
    if invalid:
        raise PluginError(f"the plugin {package} returned an encoder without a valid {', '.join(invalid)}", where=name)
