"""Text-to-image models: loading one by name, finding its conditionings, and running it on conditioning tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bridgekit.diffusion.image import AdapterConditioning, ImageConditioning, why_no_adapter, why_no_image_embeds
from bridgekit.diffusion.pipeline import call_defaults, call_parameters, guidance_argument
from bridgekit.diffusion.prompt import PromptConditioning, why_no_prompt_embeds
from bridgekit.encoders import TEXT, split_options
from bridgekit.errors import BridgekitError, PluginError, one_line
from bridgekit.hardware import resolve_device
from bridgekit.hub import model_folder
from bridgekit.image_models import Conditioning, ImageModel
from bridgekit.plugins import find_image_generator
from bridgekit.progress import Report, silent
from bridgekit.storage.bounded import read_json

if TYPE_CHECKING:
    from PIL.Image import Image

    from bridgekit.hookspecs import ImageGenerator


def find_conditionings(pipeline: Any) -> list[Conditioning]:
    """What a diffusers pipeline takes in place of a prompt, best first: IP-Adapter, image embeddings, prompt embeddings.

    The pipeline is inspected, not run.

    Raises:
        BridgekitError: it takes none of these. The message says why.
    """
    checked: list[tuple[Conditioning, str | None]] = [
        (AdapterConditioning(pipeline), why_no_adapter(pipeline)),
        (ImageConditioning(pipeline), why_no_image_embeds(pipeline)),
        (PromptConditioning(pipeline), why_no_prompt_embeds(pipeline)),
    ]
    found = [conditioning for conditioning, reason in checked if reason is None]
    if found:
        return found
    reasons = "; ".join(f"{conditioning.kind} ({reason})" for conditioning, reason in checked)
    raise BridgekitError(
        f"{type(pipeline).__name__} takes no conditioning in place of a prompt: {reasons}",
        remedy="use a pipeline whose call takes one of these",
    )


#: Called after each step with steps done, steps in total, and the current latents.
Watch = Callable[[int, int, Tensor], object]

#: Images per batch. Larger batches are no faster on a CPU, and might not fit with a large model on a small GPU.
BATCH_SIZE = 8
INDEX = "model_index.json"
MAX_INDEX = 1 << 20  # bytes of a model_index.json


def open_model(name: str | None = None, device: str = "auto") -> ImageModel:
    """Load a text-to-image model.

    Arguments:
        name: a plugin's model (`starter:openmoji-64`), a diffusers folder, or a hub id; None for the first one of any plugin.
            `,trust_remote_code=yes` after a folder or hub id lets the model's own code run.

    Raises:
        BridgekitError: there is no such model, it is incomplete, it has code that is not trusted, or its pipeline takes no
            conditioning.
    """
    device = resolve_device(device)
    known = find_image_generator(name)
    if known is not None:
        return _opened(known, device)
    if name is None:
        raise BridgekitError(
            "no installed plugin has a text-to-image model",
            remedy="in bridgekit's own folder: pip install plugins/bridgekit-starter; or give a folder or hub id with --model",
        )
    pipeline = _pipeline(name, device)
    return ImageModel(name, pipeline, find_conditionings(pipeline))


def _opened(known: ImageGenerator, device: str) -> ImageModel:
    try:
        model = known.open(device)
    except BridgekitError:
        raise
    except Exception as error:  # third-party code may raise anything
        raise PluginError(f"the plugin cannot open {known.name}: {type(error).__name__}: {error}", where=known.name) from error
    if not isinstance(model, ImageModel):
        raise PluginError(f"the plugin returned {type(model).__name__} instead of an ImageModel", where=known.name)
    return model


def _pipeline(full: str, device: str) -> Any:
    """A pipeline from a local folder or the hub, with safetensors weights only: pickles can run code."""
    name, trusted = _trust(full)
    folder = Path(name)
    local = folder.exists()
    if local and not (folder / INDEX).is_file():
        raise BridgekitError(
            f"this is not a diffusers model: it has no {INDEX}", where=name, remedy="give a folder that has one"
        )
    if not local and name.count("/") != 1:
        known = find_image_generator(None)
        example = f" such as {known.name}" if known else ""
        raise BridgekitError(
            f"there is no text-to-image model {name!r}", remedy=f"give a plugin's model{example}, a folder or a hub id"
        )
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        remedy = "in bridgekit's own folder: pip install '.[generate]'"
        raise BridgekitError("generating images needs diffusers", remedy=remedy) from error
    # Half precision on a GPU; on a CPU it is slow and not supported by every layer.
    dtype = torch.float32 if device == "cpu" else torch.float16
    options: dict[str, Any] = {"torch_dtype": dtype, "use_safetensors": True, "trust_remote_code": trusted}
    if not local:
        # Before the rest of the same commit: while it downloads that, diffusers may run what the index names.
        folder = model_folder(name, (INDEX,), plugin="bridgekit")
        name, options["revision"] = name.partition("@")[0], folder.name
    try:
        index = read_json(folder / INDEX, MAX_INDEX)
        code = "" if trusted else _own_code(index, folder if local else None)
        if code:
            raise BridgekitError(
                f"this model has code of its own, which is not run: {code}",
                where=full,
                remedy="if you have read that code and trust it, add ,trust_remote_code=yes to the name",
            )
        missing = _missing_parts(index, folder) if local else []
        if missing:
            raise FileNotFoundError(f"{' and '.join(missing)} missing")
        pipeline = DiffusionPipeline.from_pretrained(name, **options)
    except BridgekitError:
        raise
    except Exception as error:  # diffusers may raise anything for missing or damaged parts
        reason = f"{type(error).__name__}: {one_line(error)}"
        remedy = "copy the whole folder again" if local else "check the id and the network, or give a local folder"
        raise BridgekitError(f"the model cannot be loaded: {reason}", where=full, remedy=remedy) from error
    return pipeline.to(device)


def _trust(full: str) -> tuple[str, bool]:
    """The name without its option, and whether the model's own code may run."""
    name, options = split_options(full, ("trust_remote_code",))
    trusted = options.get("trust_remote_code", "no")
    if trusted not in ("yes", "no"):
        raise BridgekitError(f"trust_remote_code={trusted} must be yes or no", where=full)
    return name, trusted == "yes"


def _own_code(index: Mapping[str, Any], folder: Path | None) -> str:
    """Where a model has code of its own: in its index, or in the files of a local folder; "" if it has none.

    diffusers imports whatever library an index names for a part, and before 0.38 ran a folder's `pipeline.py` (CVE-2026-44513).
    """
    if not isinstance(index.get("_class_name"), str | None):
        return f"its _class_name in {INDEX} names a file"
    for part, kind in index.items():
        # diffusers unpacks a string of two characters, too.
        if not part.startswith("_") and isinstance(kind, list | str) and len(kind) == 2 and not _is_known(kind[0]):
            return f"its {part} in {INDEX} is from {kind[0]!r}"
    return next((str(file.relative_to(folder)) for file in sorted(folder.rglob("*.py"))), "") if folder else ""


def _is_known(library: str | None) -> bool:
    """Whether a part's library is diffusers, one of its pipelines' own modules, or transformers; None is of an absent part."""
    from diffusers import pipelines

    if library is None or library in ("diffusers", "transformers"):
        return True
    return not library.startswith("_") and hasattr(pipelines, library)


def _missing_parts(index: Mapping[str, Any], folder: Path) -> list[str]:
    """Parts that are in a model's index but not in its folder; diffusers silently creates some of them empty."""
    return [
        name
        for name, kind in index.items()
        if not name.startswith("_")
        and isinstance(kind, list)
        and len(kind) == 2
        and all(isinstance(part, str) for part in kind)
        if not (folder / name).is_dir()
    ]


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """Drawing options.

    Arguments:
        prompt: a text prompt in addition, for example for the style.
        prompt_weight: weight of the prompt relative to the embedding, from 0 to 1.
        gap: how to close the modality gap: `captions`, `mean` or `none`, see `conditioner.close_gap`.
        steps, guidance: denoising steps and guidance scale; by default the model's.
        size: side in pixels; by default the model's.
    """

    prompt: str | None = None
    prompt_weight: float = 0.3
    gap: str = "captions"
    steps: int | None = None
    guidance: float | None = None
    size: int | None = None


def draw(
    model: ImageModel,
    conditioning: Conditioning,
    tensors: Mapping[str, Tensor],
    options: DrawOptions = DrawOptions(),
    *,
    seeds: Sequence[int] | int = 0,
    report: Report = silent,
    watch: Watch | None = None,
) -> list[Image]:
    """Run the pipeline on conditioning tensors of n rows, in batches. Arguments as for `painter.paint`."""
    pipeline, takes = model.pipeline, call_parameters(model.pipeline)
    n = len(next(iter(tensors.values())))
    each = [seeds] * n if isinstance(seeds, int) else list(seeds)
    steps = options.steps or model.steps or call_defaults(pipeline).get("num_inference_steps")
    guided, scales = _guidance(model, options.guidance)
    prompt = options.prompt if conditioning.made_of != TEXT else None
    done, total = 0, (steps or 1) * -(-n // BATCH_SIZE)

    def step_done(*step: Any) -> dict[str, Any]:
        nonlocal done
        done += 1
        report("drawing", min(done, total), total)
        # Pipelines' older callbacks get the latents, newer ones a mapping that usually includes them.
        latents = step[-1].get("latents") if isinstance(step[-1], Mapping) else step[-1]
        if watch and isinstance(latents, Tensor):
            watch(done, total, latents)
        return {}

    size, side = options.size, model.size or options.size
    wanted: dict[str, Any] = {"num_inference_steps": steps, "output_type": "pil", **scales}
    wanted |= {"height": side, "width": side, "use_resolution_binning": False if side else None}
    wanted |= {"callback_on_step_end" if "callback_on_step_end" in takes else "callback": step_done}
    settings = {name: value for name, value in wanted.items() if name in takes and value is not None}
    pipeline.set_progress_bar_config(disable=True)
    pictures: list[Image] = []
    for start in range(0, n, BATCH_SIZE):
        part = {name: tensor[start : start + BATCH_SIZE] for name, tensor in tensors.items()}
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in each[start : start + BATCH_SIZE]]
        with torch.inference_mode():
            arguments = conditioning.arguments(part, guided=guided, prompt=prompt)
            try:
                pictures += pipeline(**arguments, **settings, generator=generators).images
            except (ValueError, TypeError, RuntimeError, LookupError) as error:  # LookupError: too few steps for a sampler
                raise BridgekitError(
                    f"the pipeline failed: {one_line(error)}", where=model.name, remedy="check --size, --steps and --guidance"
                ) from error
    report("drawing", total, total)
    return [picture.resize((size, size), 1) if size and picture.size != (size, size) else picture for picture in pictures]


def _guidance(model: ImageModel, guidance: float | None) -> tuple[bool, dict[str, float]]:
    """Whether to draw with negatives, and the guidance scale arguments.

    Distilled models take `guidance_scale` as an input of the model; their classifier-free guidance is `true_cfg_scale`.
    """
    defaults = call_defaults(model.pipeline)
    wanted = model.guidance if guidance is None else guidance
    name = next((name for name in ("guidance_scale", "true_cfg_scale") if defaults.get(name) is not None), None)
    scales = {name: wanted} if name and wanted is not None else {}
    decisive = guidance_argument(model.pipeline)
    if decisive is None:
        return False, scales
    scale = scales.get(decisive, defaults.get(decisive))
    if scale and scale > 1:
        return True, scales
    return False, {**scales, decisive: 0.0}  # 1 does not disable guidance in all pipelines; 0 does
