"""The errors of export: one line that names the problem and the way out."""

from __future__ import annotations


class ExportError(Exception):
    """Anything that stops an export; nothing is published then."""


class GraphError(ExportError):
    """The exported ONNX graph is not what was meant."""


class ParityError(ExportError):
    """Two forms of the model disagree. The subclasses say in what."""


class NamesDifferError(ParityError):
    """Inputs or outputs have other names."""


class AxesDifferError(ParityError):
    """An output has another number of axes."""


class ShapesDifferError(ParityError):
    """An output has another shape."""


class ValuesDifferError(ParityError):
    """An output's values differ by more than the tolerance."""
