"""The graphs that a GPU is to choose from are the bundled models' own function."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from serve.engine.graph import check_graph
from serve.engine.onnx_runtime import ort
from serve.latents import Span, draw_span
from serve.manifest import BUNDLED_DIR
from serve.models.repository import read_bundle
from tests.gpu.forms import FORMS, biases_apart


@pytest.mark.parametrize("name", ["dcgan", "cdcgan", "rpgan"])
@pytest.mark.parametrize("form", [*FORMS, "biases_apart"])
def test_every_form_of_a_model_makes_its_images(form: str, name: str) -> None:
    bundle = read_bundle(BUNDLED_DIR / name / "1")
    rows, labels = draw_span(Span(5, 0, 8), bundle.manifest.latent_size, bundle.manifest.labels)
    feeds = {"latents": rows} | ({} if labels is None else {"labels": labels})
    made = (FORMS | {"biases_apart": biases_apart})[form](bundle.model)
    check_graph(made, form)  # an engine takes it
    expected, got = (
        ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(["images", "pixels"], feeds)
        for model in (bundle.model, made)
    )
    assert np.abs(expected[0] - got[0]).max() < 2e-6
    assert (expected[1] != got[1]).mean() < 0.0005
    kinds = [node.op_type for node in onnx.load_from_string(made).graph.node]
    assert kinds.count("DepthToSpace") == {"last_as_3x3": 1, "all_as_3x3": 2 if name == "rpgan" else 3}.get(form, 0)
    assert ("ConvTranspose" in kinds) == (form not in ("all_as_3x3", "gathered"))


@pytest.mark.parametrize("form", FORMS)
def test_no_form_of_half_precision_with_channels_last_has_a_bias_in_a_convolution(form: str) -> None:
    """Issue: that path is very slow; it was taken out of transposed convolutions alone."""
    made = biases_apart(FORMS[form](read_bundle(BUNDLED_DIR / "dcgan" / "1").model))
    nodes = [node for node in onnx.load_from_string(made).graph.node if node.op_type in ("Conv", "ConvTranspose")]
    assert all(len(node.input) == 2 for node in nodes)
