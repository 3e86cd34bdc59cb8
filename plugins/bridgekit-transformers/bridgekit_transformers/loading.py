"""From a name to a model that is ready to run: its folder, its config, its weights, and the revision that names all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

from bridgekit.encoders import split_options
from bridgekit.errors import BridgekitError, PluginError
from bridgekit.hub import content_revision, model_folder, pinned
from bridgekit.storage import bounded
from bridgekit_transformers.families import FAMILIES, OPTIONS, TEXT, TOWERS, Family, Head

PLUGIN = "bridgekit-transformers"
MAX_JSON = 64 << 20  # bytes of one file of JSON: a config, or the list of which weights are in which file
#: The files of a repository that are fetched. Weights under other names are copies in other formats or precisions.
PATTERNS = (
    "*.json",
    "*.txt",
    "*.model",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "pytorch_model.bin",
    "pytorch_model-*-of-*.bin",
    "*_Dense/model.safetensors",
    "*_Dense/pytorch_model.bin",
)
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
_PREPROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
#: What some tokenizers and some preprocessing are written with. transformers does not always say so where it is missing.
_PACKAGES = {"AutoTokenizer": "sentencepiece", "AutoImageProcessor": "torchvision"}
_KNOWN_OPTIONS = ("modality", "pooling", "layers", "window", "prompt", "trust_remote_code")


@dataclass(frozen=True)
class Source:
    """A model that was found, and how it is to be opened.

    Arguments:
        name: what the user gave after `transformers:`, for messages.
        folder: where its files are.
        config: its config.json.
        family: the family that it is of.
        options: the options given, without `modality` and `trust_remote_code`.
        device: a torch device.
        trusted: whether the user lets the repository's own code run.
        code: that code.
        pinned: the full name that opens these very files on every machine.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    family: Family
    options: Mapping[str, str]
    device: torch.device
    trusted: bool = False
    code: tuple[Path, ...] = ()
    pinned: str = ""

    @property
    def model_type(self) -> str:
        """The config's `model_type`."""
        return str(self.config["model_type"])

    def choose(self, option: str, known: Sequence[str]) -> str:
        """The value of an option that has a few values, the first of which is the default.

        Raises:
            BridgekitError: the option has another value.
        """
        value = self.options.get(option, known[0])
        if value not in known:
            raise BridgekitError(
                f"{option}={value} is nothing that a model of type {self.model_type} has",
                where=f"transformers:{self.name}",
                remedy=f"choose one of: {', '.join(known)}",
            )
        return value

    def head(self) -> tuple[str, Head]:
        """The head that `pooling=` names, or the family's default, and its name."""
        heads = self.family.heads
        name = self.choose("pooling", self._own_first(tuple(heads)))
        return name, heads[name]

    def _own_first(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """A single tower of CLIP's was saved with or without its projection; its config says which."""
        classes = str(self.config.get("architectures"))
        if names[0] == "projection" and self.model_type.startswith("clip_") and "WithProjection" not in classes:
            return ("pooler", *(name for name in names if name != "pooler"))
        return names

    def error(self, what: str, remedy: str | None = None) -> PluginError:
        """An error about this model that names the plugin."""
        return PluginError(f"{PLUGIN} {what}", where=f"transformers:{self.name}", remedy=remedy)

    def revision(self, *settings: str) -> str:
        """Names the weights, the files that preprocessing depends on, and the settings, wherever the folder lies."""
        names = _TOKENIZER_FILES if self.family.kind == "text" else _PREPROCESSOR_FILES
        files = [self.folder / name for name in ("config.json", *names) if (self.folder / name).is_file()]
        dense = sorted(
            file for file in self.folder.glob("*_Dense/*") if file.name in ("model.safetensors", "pytorch_model.bin")
        )
        settings = (*settings, "remote-code") if self.trusted else settings
        content = content_revision([*weight_files(self), *files, *dense, *self.code], self.family.modality, *settings)
        return f"transformers:{self.model_type}@{content}+{'-'.join((self.family.modality, *settings))}-v1"


def find_source(model: str, device: str) -> Source:
    """The folder, family and options of `org/model`, `org/model@revision` or `/path/folder`, with options after commas.

    Raises:
        PluginError: there is no such model, or it is of a kind that this plugin does not take.
        BridgekitError: an option is unknown, is not one of this model's, or is missing.
    """
    name, options = split_options(model, _KNOWN_OPTIONS)
    trusted = options.pop("trust_remote_code", "no")
    if trusted not in ("yes", "no"):
        raise BridgekitError(f"trust_remote_code={trusted} is neither yes nor no", where=f"transformers:{model}")
    patterns = (*PATTERNS, "*.py") if trusted == "yes" else PATTERNS
    folder = model_folder(name, patterns, plugin=PLUGIN)
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or not config.get("model_type"):
        raise PluginError(
            f"{PLUGIN} finds no config.json that says what kind of model this is",
            where=str(folder),
            remedy="give a repository in the hub's layout: config.json, weights, and tokenizer or preprocessor files",
        )
    _check_code(config, model, trusted == "yes")
    family = _family(config, folder, options.pop("modality", None), model)
    for option in options:
        if option not in OPTIONS[family.kind]:
            raise BridgekitError(
                f"models of type {config['model_type']} have no option {option!r} for {family.modality}",
                where=f"transformers:{model}",
                remedy=f"their options are: {', '.join(OPTIONS[family.kind])}",
            )
    code = tuple(_code_files(config, folder)) if trusted == "yes" else ()
    full = f"transformers:{pinned(name, folder)}{model[len(name) :]}"
    return Source(model, folder, config, family, options, torch.device(device), trusted == "yes", code, full)


def _check_code(config: Mapping[str, Any], model: str, trusted: bool) -> None:
    model_type = config["model_type"]
    if model_type in transformers.CONFIG_MAPPING or (trusted and "auto_map" in config):
        return
    if "auto_map" in config:
        raise PluginError(
            f"{PLUGIN} does not run the code that this model brings with it (type {model_type})",
            where=f"transformers:{model}",
            remedy="if you have read that code and trust it, add ,trust_remote_code=yes to the name",
        )
    raise PluginError(
        f"{PLUGIN} does not take models of type {model_type}: transformers {transformers.__version__} does not know them",
        where=f"transformers:{model}",
        remedy="pip install --upgrade transformers, or choose another model",
    )


def _family(config: Mapping[str, Any], folder: Path, modality: str | None, model: str) -> Family:
    """The model's family, with the tower that `modality` asks for."""
    model_type, where = config["model_type"], f"transformers:{model}"
    if model_type in TOWERS:
        towers = {family.modality: family for family in TOWERS[model_type]}
        if modality in towers:
            return towers[modality]
        wrong = f"has no tower for {modality!r}" if modality else "has two towers: say which one is meant"
        remedy = " or ".join(f"add ,modality={known}" for known in towers)
        raise BridgekitError(f"a model of type {model_type} {wrong}", where=where, remedy=remedy)
    family = FAMILIES.get(model_type)
    if family is None and _is_text(config, folder):
        family = TEXT
    if family is None:
        known = ", ".join(sorted({*FAMILIES, *TOWERS}))
        raise PluginError(
            f"{PLUGIN} does not take models of type {model_type}",
            where=where,
            remedy=f"it takes text models that have a tokenizer, and the types {known}",
        )
    if modality not in (None, family.modality):
        raise BridgekitError(f"this model encodes {family.modality}, not {modality}", where=where, remedy="leave modality= out")
    return family


def _is_text(config: Mapping[str, Any], folder: Path) -> bool:
    """Whether a model of no other family reads text alone."""
    others = any((folder / name).is_file() for name in _PREPROCESSOR_FILES)
    others = others or any(key in config for key in ("vision_config", "audio_config"))
    return not others and any((folder / name).is_file() for name in _TOKENIZER_FILES)


def _code_files(config: Mapping[str, Any], folder: Path) -> Iterator[Path]:
    """The code that a trusted model runs: its own, and that of the repositories which its config points to."""
    yield from sorted(folder.glob("*.py"))
    references = [
        reference for value in config["auto_map"].values() for reference in (value if isinstance(value, list) else [value])
    ]
    for repository in sorted({str(reference).split("--")[0] for reference in references if "--" in str(reference)}):
        yield from sorted(model_folder(repository, ("*.py", "config.json"), plugin=PLUGIN).glob("*.py"))


def read_json(path: Path) -> Any:
    """What a JSON file holds, None where there is no such file.

    Raises:
        PluginError: the file is damaged.
    """
    try:
        return bounded.read_json(path, MAX_JSON)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise PluginError(f"{PLUGIN} cannot read a file of this model: {_one_line(error)}", where=str(path)) from None


def weight_files(source: Source) -> list[Path]:
    """The weights that transformers will load: safetensors where there are some, or else a `.bin`; whole or in shards.

    Raises:
        PluginError: there are none, or some are missing.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (source.folder / name).is_file():
            return [_checked(source, source.folder / name)]
        index = read_json(source.folder / f"{name}.index.json")
        if index is not None:
            shards = sorted({str(shard) for shard in index["weight_map"].values()})
            if any(Path(shard).name != shard for shard in shards):
                raise source.error("does not follow weights that lie outside this model's folder")
            files = [source.folder / shard for shard in shards]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise source.error(f"misses weights of this model: {', '.join(missing)}", "download the model again")
            return [_checked(source, file) for file in files]
    raise source.error(
        f"finds no weights (model.safetensors or pytorch_model.bin) in {source.folder}",
        "download the model again, or give a repository with weights for PyTorch",
    )


def _checked(source: Source, file: Path) -> Path:
    try:
        bounded.check_stored(file)
    except (OSError, ValueError) as error:
        raise source.error(f"does not read {file.name}: {error}", "get it from a source that you trust") from None
    return file


def load_model(source: Source, class_name: str, *, unused: Sequence[str] = ()) -> Any:
    """The model with its weights: float32, on the source's device, ready to run.

    Arguments:
        source: where from.
        class_name: a class in transformers.
        unused: beginnings of the names of weights that the latents do not depend on, so that they may be missing.

    Raises:
        PluginError: the weights are missing, are damaged, or are those of another model.
    """
    weight_files(source)
    # transformers 4 takes a repository's own precision only on request; 5 does so by default.
    arguments: dict[str, Any] = {"torch_dtype" if transformers.__version__.startswith("4.") else "dtype": torch.float32}
    model, loading = load_part(source, class_name, output_loading_info=True, **arguments)
    # Some versions put the prefix of the whole model before the names of a part.
    names = {name.removeprefix(f"{model.base_model_prefix}.") for name in loading["missing_keys"]}
    missing = sorted(name for name in names if not name.startswith(tuple(unused)))
    if missing:
        raise source.error(
            f"finds no weights for {len(missing)} of this model's tensors, among them {missing[0]}",
            "the file was saved from another kind of model, or is damaged: download it again, or choose another model",
        )
    return model.float().to(source.device).eval()


def load_part(source: Source, class_name: str, **arguments: Any) -> Any:
    """`from_pretrained` of a class in transformers, from the source's folder alone, without progress bars and warnings.

    Raises:
        PluginError: it fails, or the installed transformers has no such class.
    """
    # A concrete class runs no code but transformers' own and does not take the argument.
    trust = {"trust_remote_code": source.trusted} if class_name.startswith("Auto") else {}
    with _quiet():
        try:
            return getattr(transformers, class_name).from_pretrained(source.folder, local_files_only=True, **trust, **arguments)
        except Exception as error:
            package = _PACKAGES.get(class_name)
            absent = package is not None and find_spec(package) is None
            remedy = f"perhaps it needs another package: pip install {package}" if absent else None
            raise source.error(f"cannot load this model: {_one_line(error)}", remedy) from error


def vector_width(source: Source, vectors: torch.Tensor) -> int:
    """The d of vectors of shape (1, d).

    Raises:
        PluginError: they have another shape.
    """
    if vectors.ndim != 2:
        raise source.error(
            f"got {tuple(vectors.shape)} where it expected one vector: this kind of model is not one that it takes"
        )
    return int(vectors.shape[1])


def output_of(source: Source, outputs: Any, name: str) -> torch.Tensor:
    """One of a model's outputs.

    Raises:
        PluginError: the model has no such output.
    """
    value = getattr(outputs, name, None)
    if not isinstance(value, torch.Tensor):
        raise source.error(f"gets no `{name}` from a model of type {source.model_type}", "choose another pooling= or model")
    return value


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no warnings, for what matters in them is checked here. These are settings of the whole process."""
    logging: Any = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
