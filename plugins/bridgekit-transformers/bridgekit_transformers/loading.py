"""Loading a model by name: its folder, config and weights, and the revision that identifies them."""

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
from bridgekit.errors import BridgekitError, PluginError, one_line
from bridgekit.hub import content_revision, model_folder, pinned
from bridgekit.storage import bounded
from bridgekit_transformers.families import FAMILIES, OPTIONS, TEXT, TOWERS, Family, Head

PLUGIN = "bridgekit-transformers"
MAX_JSON = 64 << 20  # bytes of a JSON file: a config or a weight index
#: The repository files to download. Weights under other names are copies in other formats or precisions.
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
#: Optional packages that some tokenizers and preprocessors need; transformers does not always report them missing.
_PACKAGES = {"AutoTokenizer": "sentencepiece", "AutoImageProcessor": "torchvision"}
_KNOWN_OPTIONS = ("modality", "pooling", "layers", "window", "prompt", "trust_remote_code")


@dataclass(frozen=True)
class Source:
    """A located model, and how to open it.

    Arguments:
        name: the user's name after `transformers:`, for messages.
        folder: the folder with its files.
        config: its config.json.
        family: its family.
        options: the user's options, without `modality` and `trust_remote_code`.
        device: a torch device.
        trusted: whether the repository's own code may run.
        code: the files of that code.
        pinned: the full name that opens the same files on every machine.
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
        """The value of an option among known values, of which the first is the default.

        Raises:
            BridgekitError: the value is not known.
        """
        value = self.options.get(option, known[0])
        if value not in known:
            raise BridgekitError(
                f"models of type {self.model_type} do not support {option}={value}",
                where=f"transformers:{self.name}",
                remedy=f"choose one of: {', '.join(known)}",
            )
        return value

    def head(self) -> tuple[str, Head]:
        """Name and head selected by `pooling=`, or the family's default."""
        heads = self.family.heads
        name = self.choose("pooling", self._own_first(tuple(heads)))
        return name, heads[name]

    def _own_first(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The default first: a single CLIP tower may be saved without its projection, according to its config."""
        classes = str(self.config.get("architectures"))
        if names[0] == "projection" and self.model_type.startswith("clip_") and "WithProjection" not in classes:
            return ("pooler", *(name for name in names if name != "pooler"))
        return names

    def error(self, what: str, remedy: str | None = None) -> PluginError:
        """An error about this model, starting with the plugin's name."""
        return PluginError(f"{PLUGIN} {what}", where=f"transformers:{self.name}", remedy=remedy)

    def revision(self, *settings: str) -> str:
        """Identifies the weights, preprocessing files and settings, independent of the folder's path."""
        names = _TOKENIZER_FILES if self.family.kind == "text" else _PREPROCESSOR_FILES
        files = [self.folder / name for name in ("config.json", *names) if (self.folder / name).is_file()]
        dense = sorted(
            file for file in self.folder.glob("*_Dense/*") if file.name in ("model.safetensors", "pytorch_model.bin")
        )
        settings = (*settings, "remote-code") if self.trusted else settings
        content = content_revision([*weight_files(self), *files, *dense, *self.code], self.family.modality, *settings)
        return f"transformers:{self.model_type}@{content}+{'-'.join((self.family.modality, *settings))}-v1"


def find_source(model: str, device: str) -> Source:
    """Locate `org/model`, `org/model@revision` or `/path/folder`, with options after commas.

    Raises:
        PluginError: there is no such model, or its kind is not supported.
        BridgekitError: an option is unknown, not supported by the model, or missing.
    """
    name, options = split_options(model, _KNOWN_OPTIONS)
    trusted = options.pop("trust_remote_code", "no")
    if trusted not in ("yes", "no"):
        raise BridgekitError(f"trust_remote_code={trusted} must be yes or no", where=f"transformers:{model}")
    patterns = (*PATTERNS, "*.py") if trusted == "yes" else PATTERNS
    folder = model_folder(name, patterns, plugin=PLUGIN)
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or not config.get("model_type"):
        raise _no_config(folder)
    _check_code(config, model, trusted == "yes")
    family = _family(config, folder, options.pop("modality", None), model)
    for option in options:
        if option not in OPTIONS[family.kind]:
            raise BridgekitError(
                f"models of type {config['model_type']} have no option {option!r} for {family.modality}",
                where=f"transformers:{model}",
                remedy=f"available options: {', '.join(OPTIONS[family.kind])}",
            )
    code = tuple(_code_files(config, folder)) if trusted == "yes" else ()
    full = f"transformers:{pinned(name, folder)}{model[len(name) :]}"
    return Source(model, folder, config, family, options, torch.device(device), trusted == "yes", code, full)


def _no_config(folder: Path) -> PluginError:
    """The error for a folder without a transformers config, by what else is in it."""
    what = "found no config.json with a model_type"
    remedy = "give a transformers model folder: config.json, weights, and tokenizer or preprocessor files"
    if modules := read_json(folder / "modules.json"):
        kind, place = str(modules[0]["type"]).rpartition(".")[2], modules[0]["path"]
        what = f"does not support sentence models that begin with {kind}" + (f" in {place}" if place else "")
        remedy = "give the transformers model that it was made from, or another sentence model"
    elif (folder / "open_clip_config.json").is_file():
        what = "does not read OpenCLIP's own format, and the model has no other"
        remedy = "open its image tower by timm (timm.list_pretrained('*clip*')), or a CLIP that has a config.json"
    return PluginError(f"{PLUGIN} {what}", where=str(folder), remedy=remedy)


def _check_code(config: Mapping[str, Any], model: str, trusted: bool) -> None:
    model_type = config["model_type"]
    if model_type in transformers.CONFIG_MAPPING or (trusted and "auto_map" in config):
        return
    if "auto_map" in config:
        raise PluginError(
            f"{PLUGIN} does not run this model's own code (type {model_type})",
            where=f"transformers:{model}",
            remedy="if you have read that code and trust it, add ,trust_remote_code=yes to the name",
        )
    raise PluginError(
        f"{PLUGIN} does not support models of type {model_type}, unknown to transformers {transformers.__version__}",
        where=f"transformers:{model}",
        remedy="pip install --upgrade transformers, or choose another model",
    )


def _family(config: Mapping[str, Any], folder: Path, modality: str | None, model: str) -> Family:
    """The model's family, for the tower selected by `modality`."""
    model_type, where = config["model_type"], f"transformers:{model}"
    if model_type in TOWERS:
        towers = {family.modality: family for family in TOWERS[model_type]}
        if modality in towers:
            return towers[modality]
        wrong = f"have no tower for {modality!r}" if modality else "have two towers: choose one"
        remedy = " or ".join(f"add ,modality={known}" for known in towers)
        raise BridgekitError(f"models of type {model_type} {wrong}", where=where, remedy=remedy)
    family = FAMILIES.get(model_type)
    if family is None and _is_text(config, folder):
        family = TEXT
    if family is None:
        known = ", ".join(sorted({*FAMILIES, *TOWERS}))
        raise PluginError(
            f"{PLUGIN} does not support models of type {model_type}",
            where=where,
            remedy=f"it supports text models with a tokenizer, and the types {known}",
        )
    if modality not in (None, family.modality):
        raise BridgekitError(f"the model encodes {family.modality}, not {modality}", where=where, remedy="omit modality=")
    return family


def _is_text(config: Mapping[str, Any], folder: Path) -> bool:
    """Whether a model that is in no other family takes only text."""
    others = any((folder / name).is_file() for name in _PREPROCESSOR_FILES)
    others = others or any(key in config for key in ("vision_config", "audio_config"))
    return not others and any((folder / name).is_file() for name in _TOKENIZER_FILES)


def _code_files(config: Mapping[str, Any], folder: Path) -> Iterator[Path]:
    """The code files of a trusted model: its own, and those of repositories that its config refers to."""
    yield from sorted(folder.glob("*.py"))
    references = [
        reference for value in config["auto_map"].values() for reference in (value if isinstance(value, list) else [value])
    ]
    for repository in sorted({str(reference).split("--")[0] for reference in references if "--" in str(reference)}):
        yield from sorted(model_folder(repository, ("*.py", "config.json"), plugin=PLUGIN).glob("*.py"))


def read_json(path: Path) -> Any:
    """The content of a JSON file; None if it does not exist.

    Raises:
        PluginError: the file is damaged.
    """
    try:
        return bounded.read_json(path, MAX_JSON)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise PluginError(f"{PLUGIN} cannot read a file of this model: {one_line(error)}", where=str(path)) from None


def weight_files(source: Source) -> list[Path]:
    """The weight files that transformers will load: safetensors if present, else `.bin`; a single file or shards.

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
                raise source.error("does not load weights from outside the model's folder")
            files = [source.folder / shard for shard in shards]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise source.error(f"found no file {', '.join(missing)} of the model's weights", "download the model again")
            return [_checked(source, file) for file in files]
    raise source.error(
        f"found no weights (model.safetensors or pytorch_model.bin) in {source.folder}",
        "download the model again, or give a repository with weights for PyTorch",
    )


def _checked(source: Source, file: Path) -> Path:
    try:
        bounded.check_stored(file)
    except (OSError, ValueError) as error:
        raise source.error(f"rejected {file.name}: {error}", "get it from a source that you trust") from None
    return file


def load_model(source: Source, class_name: str, *, unused: Sequence[str] = ()) -> Any:
    """Load a model in float32 on the source's device, in evaluation mode.

    Arguments:
        source: the located model.
        class_name: a transformers class.
        unused: name prefixes of weights that may be missing, since the latents do not depend on them.

    Raises:
        PluginError: weights are missing, damaged, or of another model.
    """
    weight_files(source)
    model, info = load_part(source, class_name, output_loading_info=True, dtype=torch.float32)
    # Some versions add the full model's prefix to the names of a part.
    names = {name.removeprefix(f"{model.base_model_prefix}.") for name in info["missing_keys"]}
    missing = sorted(name for name in names if not name.startswith(tuple(unused)))
    if missing:
        raise source.error(
            f"found no weights for {len(missing)} of the model's tensors, among them {missing[0]}",
            "the file is damaged or of another kind of model: download it again, or choose another model",
        )
    return model.float().to(source.device).eval()


def load_part(source: Source, class_name: str, **arguments: Any) -> Any:
    """`from_pretrained` of a transformers class, from the source's folder only, without progress bars and warnings.

    Raises:
        PluginError: it fails, or the installed transformers has no such class.
    """
    # Concrete classes run only transformers' own code and do not take the argument.
    trust = {"trust_remote_code": source.trusted} if class_name.startswith("Auto") else {}
    with _quiet():
        try:
            return getattr(transformers, class_name).from_pretrained(source.folder, local_files_only=True, **trust, **arguments)
        except Exception as error:
            package = _PACKAGES.get(class_name)
            absent = package is not None and find_spec(package) is None
            remedy = f"it may need another package: pip install {package}" if absent else None
            raise source.error(f"cannot load this model: {one_line(error)}", remedy) from error


def vector_width(source: Source, vectors: torch.Tensor) -> int:
    """The width d of vectors of shape (1, d).

    Raises:
        PluginError: they have another shape.
    """
    if vectors.ndim != 2:
        raise source.error(f"expected one vector, not shape {tuple(vectors.shape)}: this kind of model is not supported")
    return int(vectors.shape[1])


def output_of(source: Source, outputs: Any, name: str) -> torch.Tensor:
    """One of a model's outputs.

    Raises:
        PluginError: the model has no such output.
    """
    value = getattr(outputs, name, None)
    if not isinstance(value, torch.Tensor):
        raise source.error(f"got no `{name}` from a model of type {source.model_type}", "choose another pooling= or model")
    return value


@contextmanager
def _quiet() -> Iterator[None]:
    """Disable progress bars and warnings, whose relevant cases are checked here. These are process-wide settings."""
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
