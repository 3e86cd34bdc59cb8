"""Where a named model's files are: a local folder, the hub's cache, or, only if it is in neither, fetched from the hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from bridgekit.errors import PluginError

#: Seconds to wait for the hub's first answer.
PATIENCE = 10.0
#: Weights that are read without running code first; the others are fetched only where a repository has none of these.
SAFE = "*.safetensors"
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.npz", "*.h5", "*.msgpack", "*.onnx")
_COMMIT = re.compile("[0-9a-f]{40}")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")


def model_folder(name: str, patterns: Sequence[str], *, plugin: str) -> Path:
    """The folder with a model's files.

    A model that is in the hub's cache is used as it is, without asking the hub: what a bridge was trained on does not change
    behind its back. `org/model@revision` takes a branch, tag or commit in place of `main`.

    Arguments:
        name: the path of a folder, or a hub id, `org/model` or `org/model@revision`.
        patterns: which files are needed, for example `("*.json", "*.safetensors", "*.bin")`. Where the repository has
            safetensors files among them, weights in other formats are left out.
        plugin: the package that asks, for messages.

    Raises:
        PluginError: there is no such folder or hub model, or there is no network to fetch it with.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.absolute()
    if not _HUB_ID.fullmatch(name) or folder.is_file():
        raise PluginError(
            f"{plugin} finds no folder and no hub model of this name",
            where=name,
            remedy="give the path of a folder that holds the model's config, or a hub id like org/model",
        )
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
    except ImportError as error:
        raise PluginError(f"{plugin} needs huggingface_hub for hub models", remedy="pip install huggingface_hub") from error
    repository, _, revision = name.partition("@")
    if cached := _in_cache(repository, revision or None, patterns):
        return cached
    try:
        files = HfApi().model_info(repository, revision=revision or None, timeout=PATIENCE).siblings or []
        wanted = needed_files([file.rfilename for file in files], patterns)
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=wanted, etag_timeout=PATIENCE))
    except OfflineModeIsEnabled:
        why, remedy = "HF_HUB_OFFLINE is set and the model is not in the cache", "unset it, or give the path of a local folder"
    except GatedRepoError:
        why, remedy = "the model is gated", f"accept its terms at huggingface.co/{repository}, then run: hf auth login"
    except RepositoryNotFoundError:
        why, remedy = "the hub has no such model, or it is private", "check the spelling; for a private one run: hf auth login"
    except HfHubHTTPError as error:
        why, remedy = f"the hub answered: {_one_line(error)}", "check the name and revision, or try again later"
    except Exception as error:  # each version of the hub's client has another HTTP library's errors
        why, remedy = (
            f"the hub cannot be reached ({type(error).__name__}: {_one_line(error)})",
            "connect to a network, or give the path of a local folder",
        )
    raise PluginError(f"{plugin} cannot fetch this model: {why}", where=name, remedy=remedy)


def pinned(name: str, folder: Path) -> str:
    """The name by which every machine gets this very model: of one from the hub, `org/model@commit`.

    A branch such as `main` moves. A commit names its files by their content, so a bridge that records it is not led elsewhere.

    Arguments:
        name: as it was given to `model_folder`.
        folder: what `model_folder` gave.
    """
    from_hub = folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name) and not Path(name).expanduser().is_dir()
    return f"{name.partition('@')[0]}@{folder.name}" if from_hub else name


def _in_cache(repository: str, revision: str | None, patterns: Sequence[str]) -> Path | None:
    """The model's folder in the hub's cache, if its weights are there: another program may have fetched its config alone."""
    from huggingface_hub import snapshot_download

    # First without the other weights: where there are safetensors, these were left out, and the folder is whole without them.
    other = [pattern for pattern in patterns if any(fnmatch(pattern, weights) for weights in _OTHER_WEIGHTS)]
    safe = [pattern for pattern in patterns if pattern not in other]
    wants_weights = bool(other) or any(fnmatch(pattern, SAFE) for pattern in patterns)
    for wanted, weights in ((safe, [SAFE]), ([*patterns], [SAFE, *_OTHER_WEIGHTS])):
        try:
            folder = Path(snapshot_download(repository, revision=revision, local_files_only=True, allow_patterns=wanted))
        except (OSError, ValueError):
            continue  # not in the cache, or not whole
        found = needed_files((path.relative_to(folder).as_posix() for path in folder.rglob("*")), wanted)
        if not wants_weights or any(fnmatch(file, pattern) for file in found for pattern in weights):
            return folder
    return None


def needed_files(files: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Those files that match a pattern, without weights in other formats where there are some in safetensors."""
    wanted = [file for file in files if any(fnmatch(file, pattern) for pattern in patterns)]
    if any(fnmatch(file, SAFE) for file in wanted):
        wanted = [file for file in wanted if not any(fnmatch(file, pattern) for pattern in _OTHER_WEIGHTS)]
    return wanted


def content_revision(files: Iterable[Path], *settings: str) -> str:
    """A short hash over the content of files and some settings, for an encoder's `revision`.

    The same weights give the same revision wherever they lie, so latents are found again; changed ones give another.

    Arguments:
        files: weights, configuration, vocabulary: whatever the vectors depend on. Their order does not matter, their names do.
        settings: what else the vectors depend on, for example the pooling.
    """
    whole = hashlib.sha256("\0".join(settings).encode())
    for file in sorted(files, key=lambda file: file.name):
        digest = hashlib.sha256()
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
        whole.update(file.name.encode() + b"\0" + digest.digest())
    return whole.hexdigest()[:16]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
