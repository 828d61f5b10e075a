"""The Open Inference Protocol's tensors: which ones a request may contain and ask for, over gRPC and HTTP.

A request contains ``latents`` FP32 [n, z], or ``count`` INT32 [1] with optional ``seed`` UINT64 [1] (default: random), ``start``
UINT64 [1] and ``truncation`` FP32 [1]. For a conditional model it may contain ``labels`` INT64 [1] or [n]; they are required with
latents, while addresses have labels of their own. It can ask for ``pixels`` UINT8 [n, 28, 28] (the default), ``images`` FP32
[n, 1, 28, 28] and, of a conditional model, ``labels`` INT64 [n].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve.core.request import Addresses, Digits, DigitsRequest, Latents
from serve.errors import RequestError, UnknownModelError
from serve.manifest import Manifest

NO_LABELS: NDArray[np.generic] = np.empty(0, np.int64)
MODEL_OUTPUTS = ("pixels", "images")
PLATFORM = "onnxruntime_onnx"
Tensors = Mapping[str, NDArray[np.generic]]
# Of Triton's extensions: sequences and classification.
UNSUPPORTED_PARAMETERS = {"sequence_id", "sequence_start", "sequence_end", "classification", "class_count"}


class Tensor(NamedTuple):
    """A tensor of the protocol: its datatype, numpy's type for its bytes, and the field of its typed contents."""

    datatype: str
    dtype: str
    contents: str


INPUTS = {
    "latents": Tensor("FP32", "<f4", "fp32_contents"),
    "seed": Tensor("UINT64", "<u8", "uint64_contents"),
    "count": Tensor("INT32", "<i4", "int_contents"),
    "start": Tensor("UINT64", "<u8", "uint64_contents"),
    "truncation": Tensor("FP32", "<f4", "fp32_contents"),
    "labels": Tensor("INT64", "<i8", "int64_contents"),
}
OUTPUTS = {
    "pixels": Tensor("UINT8", "u1", "uint_contents"),
    "images": Tensor("FP32", "<f4", "fp32_contents"),
    "labels": Tensor("INT64", "<i8", "int64_contents"),
}


def output_names(asked: Sequence[str]) -> list[str]:
    """The outputs that a request asks for. Raises RequestError naming the one that cannot be had."""
    names = list(asked) or ["pixels"]
    for name in names:
        if name not in OUTPUTS:
            raise RequestError(f"outputs: {name[:64]!r} is unknown; there are {', '.join(OUTPUTS)}", "outputs")
    if len(set(names)) < len(names):
        raise RequestError("outputs: the same tensor is asked for twice", "outputs")
    return names


def to_request(
    model: str,
    version: str,
    tensors: Tensors,
    names: Sequence[str],
    *,
    deadline: float | None,
    row_bytes: int,
) -> DigitsRequest:
    """The request that some tensors are; ``row_bytes`` as in ``DigitsRequest``. Raises RequestError naming the tensor."""
    labels = tensors.get("labels", NO_LABELS)
    if labels.ndim != 1:
        raise RequestError(f"inputs: labels must have shape [1] or [n], got {list(labels.shape)}", "labels")
    name, number = named(model, version)
    return DigitsRequest(
        rows=_rows({name: values for name, values in tensors.items() if name != "labels"}),
        model=name,
        version=number,
        labels=labels.astype(np.int64, copy=False),
        outputs=tuple(output for output in MODEL_OUTPUTS if output in names) or MODEL_OUTPUTS[:1],
        encoding="float32" if "images" in names else "uint8",
        deadline=deadline,
        row_bytes=row_bytes,
    )


def outputs_of(digits: Digits, names: Sequence[str]) -> dict[str, tuple[tuple[int, ...], list[NDArray[np.generic]]]]:
    """Shape and pieces of each output that was asked for. Raises RequestError when the model has no labels."""
    manifest = digits.model.manifest
    if "labels" in names and digits.labels is None:
        raise RequestError(f"outputs: labels cannot be had of {manifest.name}, which is unconditional", "outputs")
    shapes = {spec.name: (digits.count, *spec.shape) for spec in manifest.outputs} | {"labels": (digits.count,)}
    pieces: dict[str, list[NDArray[np.generic]]] = {"pixels": [*digits.pixels], "images": [*digits.images]}
    if digits.labels is not None:
        pieces["labels"] = [digits.labels]
    return {name: (shapes[name], pieces[name]) for name in names}


def shapes_of(manifest: Manifest) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """What a model takes and gives: tensor → its shape, -1 where it is up to the request."""
    taken = {spec.name: [-1, *spec.shape] for spec in manifest.inputs}
    taken |= {name: [1] for name in ("seed", "count", "start", "truncation")}
    given = {spec.name: [-1, *spec.shape] for spec in manifest.outputs}
    if "labels" in taken:
        given["labels"] = taken["labels"]
    return taken, given


def check_shape(name: str, shape: Sequence[int], given: float) -> None:
    """Raises RequestError for a shape that cannot be, or that ``given`` values do not fill."""
    if not 1 <= len(shape) <= 2 or min(shape) < 1:
        raise RequestError(f"inputs: {name} has the impossible shape {list(shape)[:8]}", name)
    wanted = int(np.prod(shape, dtype=object))
    if given != wanted:
        raise RequestError(f"inputs: {name} of shape {list(shape)} needs {wanted} values, got {given:g}", name, wanted)


def check_input(name: str, datatype: str, taken: Iterable[str]) -> Tensor:
    """What a tensor of that name is. Raises RequestError for one that is unknown, twice there, or of another datatype."""
    if name not in INPUTS:
        raise RequestError(f"inputs: {name[:64]!r} is unknown; there are {', '.join(INPUTS)}", "inputs")
    if name in taken:
        raise RequestError(f"inputs: {name} is given twice", name)
    if datatype != INPUTS[name].datatype:
        raise RequestError(f"inputs: {name} must be {INPUTS[name].datatype}, got {datatype[:20]!r}", name)
    return INPUTS[name]


def check_parameters(names: Iterable[str]) -> None:
    """Raises RequestError for a parameter that asks for another answer than this server can give; others are echoed."""
    for name in names:
        if name in UNSUPPORTED_PARAMETERS or name.startswith("shared_memory_"):
            raise RequestError(f"parameters: {name} is not supported; leave it out", "parameters")


def named(name: str, number: str) -> tuple[str, int]:
    """A model's name and version, 0 for none in particular. Raises ServeError."""
    if not name:
        raise RequestError("a model name is needed", "model")
    if number and not (number.isascii() and number.isdecimal() and len(number) <= 18):
        raise UnknownModelError(f"model {name[:64]!r} has no version {number[:20]!r}", name)
    return name, int(number or 0)


def _rows(tensors: Tensors) -> Addresses | Latents:
    """The rows that the tensors other than labels ask for. Raises RequestError naming the tensor."""
    if "latents" in tensors:
        if len(tensors) > 1:
            raise RequestError("inputs: latents cannot go with seed, count, start or truncation", "latents")
        if tensors["latents"].ndim != 2:
            raise RequestError(f"inputs: latents must have shape [n, z], got {list(tensors['latents'].shape)}", "latents")
        return Latents(tensors["latents"].astype(np.float32, copy=False))
    if "count" not in tensors:
        raise RequestError("inputs: count is missing; give latents, or count, with seed or without", "count")
    for name, values in tensors.items():
        if values.shape != (1,):
            raise RequestError(f"inputs: {name} must have shape [1], got {list(values.shape)}", name)
    numbers = {name: values[0].item() for name, values in tensors.items()}
    return Addresses(numbers.get("seed"), numbers.get("start", 0), numbers["count"], numbers.get("truncation", 0.0))
