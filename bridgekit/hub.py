"""Finding a model's files: a local folder, the Hugging Face cache, or else a download from the hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from fnmatch import fnmatch
from pathlib import Path

from bridgekit.errors import PluginError, one_line

#: Seconds to wait for the hub's first answer.
PATIENCE = 10.0
#: Weights that cannot run code when loaded. Other formats are fetched only if a repository has no such files.
SAFE = "*.safetensors"
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.npz", "*.h5", "*.msgpack", "*.onnx")
_COMMIT = re.compile("[0-9a-f]{40}")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")
#: Where nothing may be downloaded: what the user can do about it.
_REMEDY: ContextVar[str | None] = ContextVar("_REMEDY", default=None)


def model_folder(name: str, patterns: Sequence[str], *, plugin: str) -> Path:
    """The folder with a model's files.

    A cached model is used without contacting the hub, so the encoder of a bridge does not change unnoticed.
    `org/model@revision` selects a branch, tag or commit other than `main`.

    Arguments:
        name: the path of a folder, or a hub id, `org/model` or `org/model@revision`.
        patterns: which files are needed, for example `("*.json", "*.safetensors", "*.bin")`. If safetensors files are
            among them, weights in other formats are skipped.
        plugin: the calling package, for messages.

    Raises:
        PluginError: there is no such folder or hub model, or it cannot or must not be downloaded, see `without_downloads`.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.absolute()
    if not _HUB_ID.fullmatch(name) or folder.is_file():
        raise PluginError(
            f"{plugin} found no folder with this name, and it is not a hub id",
            where=name,
            remedy="give the path of a folder with the model's config, or a hub id like org/model",
        )
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
    except ImportError as error:
        raise PluginError(f"{plugin} needs huggingface_hub for hub models", remedy="pip install huggingface_hub") from error
    repository, _, revision = name.partition("@")
    if cached := _in_cache(repository, revision or None, patterns):
        return cached
    check_download(name, f"hf download {repository}{revision and f' --revision {revision}'}", plugin=plugin)
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
        why, remedy = f"the hub answered: {one_line(error)}", "check the name and revision, or try again later"
    except Exception as error:  # the hub client's HTTP library, and so its exceptions, depend on its version
        why = f"the hub cannot be reached ({type(error).__name__}: {one_line(error)})"
        remedy = "connect to a network, or give the path of a local folder"
    raise PluginError(f"{plugin} cannot fetch this model: {why}", where=name, remedy=remedy)


class DownloadRefused(PluginError):
    """A model would have to be downloaded, which the user has not allowed."""


@contextmanager
def without_downloads(remedy: str) -> Iterator[None]:
    """What is opened meanwhile, in this thread, is not downloaded: a model that is not on disk is an error with this remedy."""
    token = _REMEDY.set(remedy)
    try:
        yield
    finally:
        _REMEDY.reset(token)


def check_download(name: str, command: str = "", *, plugin: str) -> None:
    """For plugins that download by themselves, not by `model_folder`: to be called before that.

    Arguments:
        name: what would be downloaded.
        command: a command with which the user can download it.
        plugin: the calling package, for the message.

    Raises:
        DownloadRefused: nothing may be downloaded now, see `without_downloads`.
    """
    if remedy := _REMEDY.get():
        raise DownloadRefused(
            f"a bridge names this model, and {plugin} would have to download it, which needs your permission",
            where=name,
            remedy=f"{remedy}, or run: {command}" if command else remedy,
        )


def pinned(name: str, folder: Path) -> str:
    """The name that resolves to the same model on every machine: `org/model@commit` for a hub model.

    A branch such as `main` moves; a commit identifies its files by content, so bridges record the commit. `folder` is what
    `model_folder` returned for `name`.
    """
    from_hub = folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name) and not Path(name).expanduser().is_dir()
    return f"{name.partition('@')[0]}@{folder.name}" if from_hub else name


def _in_cache(repository: str, revision: str | None, patterns: Sequence[str]) -> Path | None:
    """The model's folder in the hub cache, if it has weights: another program may have fetched only the config."""
    from huggingface_hub import snapshot_download

    # First without the other weight formats, which are not fetched if there are safetensors.
    other = [pattern for pattern in patterns if any(fnmatch(pattern, weights) for weights in _OTHER_WEIGHTS)]
    safe = [pattern for pattern in patterns if pattern not in other]
    wants_weights = bool(other) or any(fnmatch(pattern, SAFE) for pattern in patterns)
    for wanted in (safe, [*patterns]):
        try:
            folder = Path(snapshot_download(repository, revision=revision, local_files_only=True, allow_patterns=wanted))
        except (OSError, ValueError):
            continue  # not in the cache, or incomplete
        found = needed_files((path.relative_to(folder).as_posix() for path in folder.rglob("*")), wanted)
        if not wants_weights or any(fnmatch(file, pattern) for file in found for pattern in (SAFE, *_OTHER_WEIGHTS)):
            return folder
    return None


def needed_files(files: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The files that match a pattern, without other weight formats if there are safetensors."""
    wanted = [file for file in files if any(fnmatch(file, pattern) for pattern in patterns)]
    if any(fnmatch(file, SAFE) for file in wanted):
        wanted = [file for file in wanted if not any(fnmatch(file, pattern) for pattern in _OTHER_WEIGHTS)]
    return wanted


def content_revision(files: Iterable[Path], *settings: str) -> str:
    """A short hash over file contents and settings, for an encoder's `revision`.

    The same weights have the same revision in any folder, so stored latents are found again.

    Arguments:
        files: everything the vectors depend on: weights, configuration, vocabulary. Names count, order does not.
        settings: anything else they depend on, for example the pooling.
    """
    whole = hashlib.sha256("\0".join(settings).encode())
    for file in sorted(files, key=lambda file: file.name):
        digest = hashlib.sha256()
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
        whole.update(file.name.encode() + b"\0" + digest.digest())
    return whole.hexdigest()[:16]
