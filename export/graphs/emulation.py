"""Runs a served graph as a GPU's matrix units would, so that their rounding is known where there is no GPU.

A model, not the device: products are exact; of each block of them and the sum so far all is cut off that lies more than
``FRACTION_BITS`` below the largest exponent, and the new sum is cut to float32. So Khattak & Mikaitis found an H100's to do
(2025, "Accurate Models of NVIDIA Tensor Cores", arXiv:2512.07004). A convolution's sum goes through its taps, and in each through
the channels; cuDNN may take another order, and cut it into several.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor
from torch.nn import functional

FRACTION_BITS = 25
BLOCK = {torch.float32: 8, torch.float16: 16}  # products that are summed at once: TF32, half precision
FLOAT32_BITS, TF32_BITS = 23, 10  # of a fraction
FLOAT64_BITS = 52

Arithmetic = Literal["float64", "float32", "matrix units"]
Array = NDArray[Any]


def emulate(model: bytes, feeds: Mapping[str, Array], arithmetic: Arithmetic) -> dict[str, Array]:
    """Run a graph: in float64 throughout, in float32, or with what its products would be on an H100's matrix units.

    There float32 operands are rounded to TF32, and half precision is taken as it is; everything else is in the graph's own types.
    """
    graph = onnx.load_from_string(model)
    if arithmetic == "float64":
        _widen(graph)
        feeds = {**feeds, "latents": feeds["latents"].astype(np.float64)}
    evaluator = ReferenceEvaluator(graph, new_ops=_operators(_PRODUCTS[arithmetic]))
    return dict(zip((value.name for value in graph.graph.output), evaluator.run(None, dict(feeds)), strict=True))


def _widen(graph: onnx.ModelProto) -> None:
    """Have float64 where there is float32, in weights and inputs."""
    for tensor in graph.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    for value in graph.graph.input:
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE


def to_tf32(values: Array) -> NDArray[np.float32]:
    """Float32 rounded to the ten bits of fraction that TF32 has, to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    dropped = FLOAT32_BITS - TF32_BITS
    rounded = bits + np.uint32((1 << dropped - 1) - 1) + (bits >> np.uint32(dropped) & np.uint32(1))
    return (rounded & np.uint32(0xFFFFFFFF << dropped & 0xFFFFFFFF)).view(np.float32)


def _by_matrix_units(left: Tensor, right: Tensor) -> Tensor:
    """(m, k) · (k, n) in blocks of k, each cut off below its largest exponent and then to float32."""
    block = BLOCK[left.dtype]
    if left.dtype == torch.float32:
        left, right = (torch.from_numpy(to_tf32(each.numpy())) for each in (left, right))
    left, right = left.double(), right.double()
    total = torch.zeros(len(left), right.shape[1], dtype=torch.float64)
    for first in range(0, left.shape[1], block):
        products = left[:, first : first + block, None] * right[None, first : first + block]
        top = torch.maximum(products.abs().amax(1), total.abs())
        scale = torch.ldexp(torch.ones_like(top), FRACTION_BITS + 1 - torch.frexp(top).exponent)
        total = ((products * scale[:, None]).trunc_().sum(1) + (total * scale).trunc_()) / scale
        total = (total.view(torch.int64) & -(1 << FLOAT64_BITS - FLOAT32_BITS)).view(torch.float64)
    return total


Product = Callable[[Tensor, Tensor], Tensor]
_PRODUCTS: dict[Arithmetic, Product] = {
    "float64": lambda left, right: left.double() @ right.double(),
    "float32": lambda left, right: left.float() @ right.float(),
    "matrix units": _by_matrix_units,
}


def _operators(product: Product) -> list[type[OpRun]]:
    """The operators that are made of products; their results have the type of their first operand."""

    class Gemm(OpRun):
        op_domain = ""

        def _run(self, a: Array, b: Array, c: Array | None = None, transB: int = 0, **_: Any) -> tuple[Array]:  # noqa: N803  # ONNX's
            right = _tensor(b.T if transB else b)
            return (_biased(product(_tensor(a), right).numpy(), c, a.dtype),)

    class Conv(OpRun):
        op_domain = ""

        def _run(self, x: Array, w: Array, b: Array | None = None, pads: Any = None, **_: Any) -> tuple[Array]:
            maps, weight = _tensor(x), _tensor(w)
            kernel = weight.shape[-1]
            columns = _columns(maps, kernel, pads[0])  # (n, c, k, k, h, w)
            rows = columns.permute(0, 4, 5, 2, 3, 1).reshape(-1, weight[0].numel())
            made = (
                product(rows, weight.permute(2, 3, 1, 0).reshape(-1, len(weight)))
                .view(len(x), *columns.shape[-2:], -1)
                .permute(0, 3, 1, 2)
            )
            return (_biased(made.numpy(), None if b is None else b[:, None, None], x.dtype),)

    class ConvTranspose(OpRun):
        op_domain = ""

        def _run(self, x: Array, w: Array, b: Array | None = None, pads: Any = None, **_: Any) -> tuple[Array]:
            made = _transposed(_tensor(x), _tensor(w), pads[0], product)
            return (_biased(made.numpy(), None if b is None else b[:, None, None], x.dtype),)

    return [Gemm, Conv, ConvTranspose]


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(np.array(array))  # weights are not to be written


def _columns(maps: Tensor, kernel: int, padding: int) -> Tensor:
    """What each output position sees: (n, c, k, k, h, w)."""
    padded = functional.pad(maps, [padding] * 4)
    return padded.unfold(2, kernel, 1).unfold(3, kernel, 1).permute(0, 1, 4, 5, 2, 3)


def _transposed(maps: Tensor, weight: Tensor, padding: int, product: Product) -> Tensor:
    """A transposed convolution of stride 2, each output position's sum over the taps that meet an input."""
    batch, channels, height, width = maps.shape
    kernel, lead = weight.shape[-1], weight.shape[-1] - 1 - padding
    spread = maps.new_zeros(batch, channels, 2 * height - 1, 2 * width - 1)
    spread[:, :, ::2, ::2] = maps
    columns, flipped = _columns(spread, kernel, lead), weight.flip(2, 3)  # (c, out, k, k)
    made = torch.empty(batch, weight.shape[1], *columns.shape[-2:], dtype=torch.float64)
    for row in (0, 1):
        for column in (0, 1):
            down, across = ([tap for tap in range(kernel) if (first + tap - lead) % 2 == 0] for first in (row, column))
            seen = columns[:, :, down][:, :, :, across][..., row::2, column::2]
            left = seen.permute(0, 4, 5, 2, 3, 1).reshape(-1, channels * len(down) * len(across))
            right = flipped[:, :, down][:, :, :, across].permute(2, 3, 0, 1).reshape(left.shape[1], -1)
            made[:, :, row::2, column::2] = product(left, right).view(batch, *seen.shape[-2:], -1).permute(0, 3, 1, 2)
    return made


def _biased(made: Array, bias: Array | None, kind: np.dtype[Any]) -> Array:
    return (made if bias is None else made + bias).astype(kind)
