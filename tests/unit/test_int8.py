"""A generator in 8 bits: the phases are the same function, and what rounding costs is bounded."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from export.errors import GraphError
from export.graphs.to_int8 import _by_phases, to_int8
from serve.engine.factory import make_engine
from serve.engine.provider import EngineOptions
from serve.engine.session import PIXELS_AND_IMAGES
from serve.latents import Span, draw_span
from serve.manifest import BUNDLED_DIR
from serve.models.repository import Bundle, read_bundle

CONVOLUTIONAL = ("dcgan", "cdcgan")


def bundle_of(name: str) -> Bundle:
    return read_bundle(BUNDLED_DIR / name / "1")


def made(model: bytes, bundle: Bundle, count: int = 64) -> dict[str, NDArray[np.generic]]:
    rows = draw_span(Span(5, 0, count), bundle.manifest.latent_size, bundle.manifest.labels)
    return make_engine(model, bundle.manifest, EngineOptions(), 16).compute(*rows, PIXELS_AND_IMAGES)


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_convolutions_by_phase_are_the_transposed_convolutions(name: str) -> None:
    bundle = bundle_of(name)
    graph = onnx.load_from_string(bundle.model)
    hidden = _by_phases(graph)
    assert not [node for node in graph.graph.node if node.op_type == "ConvTranspose"]
    assert [node.op_type for node in graph.graph.node if node.name in hidden].count("Conv") == 2
    before, after = made(bundle.model, bundle), made(graph.SerializeToString(), bundle)
    assert np.abs(before["images"] - after["images"]).max() < 1e-5


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_eight_bits_keep_the_digits(name: str) -> None:
    bundle = bundle_of(name)
    model = to_int8(bundle.model, bundle.manifest.latent_size, bundle.manifest.labels)
    weights = [tensor for tensor in onnx.load_from_string(model).graph.initializer if len(tensor.dims) == 4]
    kinds = [tensor.data_type for tensor in weights]
    assert kinds.count(onnx.TensorProto.INT8) == 2, "the hidden layers' weights, and not the last one's"
    assert len(model) < 0.75 * len(bundle.model)
    before, after = made(bundle.model, bundle), made(model, bundle)
    assert np.abs(before["images"] - after["images"]).mean() < 0.01
    assert (np.abs(before["pixels"].astype(int) - after["pixels"]) > 25).mean() < 0.02


def test_a_generator_without_transposed_convolutions_has_nothing_to_gain() -> None:
    bundle = bundle_of("mlp")
    with pytest.raises(GraphError, match="transposed convolutions of kernel 4 and stride 2"):
        to_int8(bundle.model, bundle.manifest.latent_size, 0)
