"""The bundle's manifest: the contract between export, which writes it, and serve, which reads it. Standard library only.

models/<name>/<version>/
    model.onnx     inputs ``latents`` float32 [batch, z] and, of a conditional model, ``labels`` int64 [batch];
                   outputs ``images`` float32 [batch, 1, 28, 28] in [0, 1] and ``pixels`` uint8 [batch, 28, 28]
    model.ts       the same function as TorchScript
    parity.json    eager, TorchScript and ONNX Runtime compared
    quality.json   its digits judged beside real ones (train/evaluate.py); not in every bundle
    preview.png    what it makes
    manifest.json  everything below, with the SHA-256 of every other file
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve.errors import BundleError

SCHEMA_VERSION = 3
MANIFEST_FILE = "manifest.json"
ONNX_FILE = "model.onnx"
TORCHSCRIPT_FILE = "model.ts"
PARITY_FILE = "parity.json"
PREVIEW_FILE = "preview.png"
QUALITY_FILE = "quality.json"
REQUIRED_FILES = (ONNX_FILE, TORCHSCRIPT_FILE, PARITY_FILE, PREVIEW_FILE)

PRECISIONS = ("fp32", "fp16")
NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
MAX_MANIFEST_BYTES = 4 << 20
MAX_LATENT_SIZE = 4096
MAX_GOLDEN_SAMPLES = 64
GOLDEN_ARRAYS = ("latents", "labels", "pixels")


@dataclass(frozen=True, kw_only=True)
class Golden:
    """Samples made by eager PyTorch at export, for the server's own check.

    ``latents`` holds ``count`` rows of little-endian float32 (z values each), ``labels`` a little-endian int64 for each of
    a conditional model's rows, ``pixels`` the same rows' uint8 pixels.
    """

    count: int
    latents: bytes
    labels: bytes
    pixels: bytes


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far two runs of the same model may differ; what parity and the server's own checks go by."""

    images: float  # largest absolute difference of a pixel in [0, 1]
    pixel_levels: int  # largest difference of a uint8 pixel
    pixel_identical_share: float  # share of uint8 pixels that must be identical


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything a reader needs to know of a bundle. ``training`` is free-form: what made the weights."""

    schema_version: int
    name: str
    version: int
    architecture: str
    latent_size: int
    latent_distribution: str
    labels: int  # how many classes can be asked for; 0 for an unconditional model
    height: int
    width: int
    opset: int
    precision: str  # of weights and arithmetic: fp32 or fp16
    producers: Mapping[str, str]
    training: Mapping[str, Any]
    tolerance: Tolerance
    golden: Golden
    files: Mapping[str, str]  # file name → SHA-256, hexadecimal

    def to_json(self) -> str:
        """The text of ``manifest.json``."""
        values = dataclasses.asdict(self)
        for name in GOLDEN_ARRAYS:
            values["golden"][name] = base64.b64encode(getattr(self.golden, name)).decode()
        return json.dumps(values, indent=2) + "\n"


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Read ``manifest.json``'s bytes. Raises BundleError naming ``where`` and the field that is wrong."""
    if len(content) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{where} is over {MAX_MANIFEST_BYTES} bytes; export the model again")
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        raise BundleError(f"{where} is not valid JSON; export the model again") from None
    if not isinstance(values, dict):
        raise BundleError(f"{where} is not a JSON object; export the model again")
    if values.get("schema_version") != SCHEMA_VERSION:
        found = ascii(values.get("schema_version"))[:20]
        raise BundleError(f"{where} has schema version {found}, this server reads {SCHEMA_VERSION}; export again")
    try:
        values["tolerance"] = Tolerance(**_checked(values.get("tolerance"), Tolerance, where))
        golden = _checked(values.get("golden"), Golden, where)
        golden |= {name: base64.b64decode(golden[name], validate=True) for name in GOLDEN_ARRAYS}
        values["golden"] = Golden(**golden)
    except (binascii.Error, ValueError, TypeError):
        raise BundleError(f"{where}: golden samples are not base64; export the model again") from None
    manifest = Manifest(**_checked(values, Manifest, where))
    _check_values(manifest, where)
    return manifest


def sha256(content: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(content).hexdigest()


_KINDS: Mapping[str, Any] = {
    "int": int, "str": str, "float": (int, float), "bytes": str, "Mapping[str, str]": dict, "Mapping[str, Any]": dict,
    "Golden": Golden, "Tolerance": Tolerance,
}  # fmt: skip


def _checked(values: Any, kind: Any, where: str) -> dict[str, Any]:
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    if not isinstance(values, dict) or set(values) != set(fields):
        keys = set(values) if isinstance(values, dict) else set()
        odd = sorted(keys ^ set(fields)) or ["?"]
        raise BundleError(f"{where}: field {odd[0][:40]!r} is missing or unknown; export the model again")
    for name, type_name in fields.items():
        value = values[name]
        wanted = _KINDS[str(type_name)]
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise BundleError(f"{where}: field {name!r} is of the wrong type; export the model again")
        if "str, str" in str(type_name) and not all(isinstance(item, str) for item in value.values()):
            raise BundleError(f"{where}: field {name!r} must map to strings; export the model again")
    return dict(values)


def _check_values(manifest: Manifest, where: str) -> None:
    golden = manifest.golden
    checks = {
        "name": NAME_PATTERN.fullmatch(manifest.name) is not None,
        "version": 1 <= manifest.version < 1 << 63,
        "latent_size": 1 <= manifest.latent_size <= MAX_LATENT_SIZE,
        "precision": manifest.precision in PRECISIONS,
        "labels": 0 <= manifest.labels <= 1000,
        "height": manifest.height == 28,
        "width": manifest.width == 28,
        "golden": 1 <= golden.count <= MAX_GOLDEN_SAMPLES
        and len(golden.latents) == golden.count * manifest.latent_size * 4
        and len(golden.labels) == golden.count * (8 if manifest.labels else 0)
        and all(0 <= label < manifest.labels for (label,) in struct.iter_unpack("<q", golden.labels))
        and len(golden.pixels) == golden.count * manifest.height * manifest.width,
        "tolerance": 0 <= manifest.tolerance.images < 1
        and 0 <= manifest.tolerance.pixel_levels < 256
        and 0 <= manifest.tolerance.pixel_identical_share <= 1,
        "files": set(REQUIRED_FILES) <= set(manifest.files),
    }
    for name, holds in checks.items():
        if not holds:
            raise BundleError(f"{where}: field {name!r} has an unusable value; export the model again")
