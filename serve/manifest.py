"""The bundle's manifest: the contract between export, which writes it, and serve, which reads it.

models/<name>/<version>/
    model.onnx     inputs and outputs as ``Manifest.inputs`` and ``Manifest.outputs`` list them, each with a batch axis first
    model.ts       the same function as TorchScript
    parity.json    eager, TorchScript and ONNX Runtime compared
    quality.json   its digits judged beside real ones (train/evaluation/evaluate.py); not in every bundle
    preview.png    what it makes
    manifest.json  everything below, with the SHA-256 of every other file
"""

from __future__ import annotations

import hashlib
import re
import struct
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from serve.errors import BundleError

BUNDLED_DIR = Path(__file__).parent / "bundled"

SCHEMA_VERSION = 5
READABLE_SCHEMA_VERSIONS = (3, 4, 5)  # 4 added batch_sizes, 5 cuda_buckets and tf32x3
MANIFEST_FILE = "manifest.json"
ONNX_FILE = "model.onnx"
TORCHSCRIPT_FILE = "model.ts"
PARITY_FILE = "parity.json"
PREVIEW_FILE = "preview.png"
QUALITY_FILE = "quality.json"
REQUIRED_FILES = (ONNX_FILE, TORCHSCRIPT_FILE, PARITY_FILE, PREVIEW_FILE)

# Of products: float32; half precision; of each three in TF32, in float32 graphs for matrix units (export/graphs/to_tf32x3.py).
Precision = Literal["fp32", "fp16", "tf32x3"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "tf32x3")
NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
MAX_VERSION_DIGITS = 18  # so that every version fits an int64
MAX_MANIFEST_BYTES = 4 << 20

Level = Annotated[int, Meta(ge=0, le=255)]
Share = Annotated[float, Meta(ge=0, le=1)]
BatchSize = Annotated[int, Meta(ge=1, le=4096)]


class TensorSpec(NamedTuple):
    """One input or output of the graph: its numpy dtype, and its shape without the batch axis."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Golden(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Samples made by eager PyTorch at export, for the server's own check; base64 in the JSON.

    ``latents`` holds ``count`` rows of little-endian float32 (z values each), ``labels`` a little-endian int64 for each of
    a conditional model's rows, ``pixels`` the same rows' uint8 pixels.
    """

    count: Annotated[int, Meta(ge=1, le=64)]
    latents: bytes
    labels: bytes
    pixels: bytes


class Tolerance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far two runs of the same model may differ; parity and the server's own checks use it."""

    images: Annotated[float, Meta(ge=0, lt=1)]  # largest absolute difference of a pixel in [0, 1]
    pixel_levels: Level  # largest difference of a uint8 pixel
    pixel_identical_share: Share  # share of uint8 pixels that must be identical


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a reader needs to know of a bundle. ``training`` is free-form: what made the weights."""

    schema_version: int
    name: Annotated[str, Meta(pattern=rf"\A{NAME_PATTERN.pattern}\Z")]
    version: Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]
    architecture: str
    latent_size: Annotated[int, Meta(ge=1, le=4096)]
    latent_distribution: str
    labels: Annotated[int, Meta(ge=0, le=1000)]  # how many classes can be asked for; 0 for an unconditional model
    height: Literal[28]
    width: Literal[28]
    opset: int
    precision: Precision  # of weights and arithmetic
    producers: dict[str, str]
    training: dict[str, Any]
    tolerance: Tolerance
    golden: Golden
    files: dict[str, str]  # file name → SHA-256, hexadecimal
    batch_sizes: dict[str, BatchSize] = {}  # provider → most images in one run, as ``python -m export batch-size`` measures
    cuda_buckets: tuple[BatchSize, ...] = ()  # rows of a run on CUDA, ascending; empty: as ``serve.engine.provider`` has them

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The graph's inputs, in its own order. Whatever feeds the model goes by this tuple alone."""
        latents = TensorSpec("latents", "float32", (self.latent_size,))
        return (latents, TensorSpec("labels", "int64", ())) if self.labels else (latents,)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The graph's outputs: ``pixels`` as bytes, ``images`` in [0, 1]."""
        return (
            TensorSpec("pixels", "uint8", (self.height, self.width)),
            TensorSpec("images", "float32", (1, self.height, self.width)),
        )

    def to_json(self) -> str:
        """The text of ``manifest.json``."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode() + "\n"


class _Versioned(msgspec.Struct):
    """What tells which schema the rest is of."""

    schema_version: Any = None


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Read ``manifest.json``'s bytes. Raises BundleError naming ``where`` and the field that is wrong."""
    if len(content) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{where} is over {MAX_MANIFEST_BYTES} bytes; export the model again")
    try:
        schema = msgspec.json.decode(content, type=_Versioned).schema_version
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise BundleError(f"{where} is not valid JSON, or no object; export the model again") from None
    if schema not in READABLE_SCHEMA_VERSIONS:
        known = ", ".join(map(str, READABLE_SCHEMA_VERSIONS))
        raise BundleError(f"{where} has schema version {ascii(schema)[:20]}, this server reads {known}; export again")
    try:
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise BundleError(f"{where}: {reason}; export the model again") from None
    golden = manifest.golden
    checks = {
        "golden.latents": len(golden.latents) == golden.count * manifest.latent_size * 4,
        "golden.labels": len(golden.labels) == golden.count * (8 if manifest.labels else 0)
        and all(0 <= label < manifest.labels for (label,) in struct.iter_unpack("<q", golden.labels)),
        "golden.pixels": len(golden.pixels) == golden.count * manifest.height * manifest.width,
        "files": set(REQUIRED_FILES) <= set(manifest.files),
        "cuda_buckets": list(manifest.cuda_buckets) == sorted(set(manifest.cuda_buckets)),
    }
    for name, holds in checks.items():
        if not holds:
            raise BundleError(f"{where}: field {name!r} has an unusable value; export the model again")
    return manifest


def is_version(text: str) -> bool:
    """Whether a text, a folder's name for one, is a version number: decimal, 1 or more, no leading zero."""
    return text.isascii() and text.isdecimal() and len(text) <= MAX_VERSION_DIGITS and not text.startswith("0")


def sha256(content: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(content).hexdigest()
