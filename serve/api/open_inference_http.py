"""The Open Inference Protocol v2 over HTTP: ``/v2/…`` in JSON, with tensors in JSON or, by the binary extension, as raw bytes.

With ``Inference-Header-Content-Length`` the body starts with that many bytes of JSON, followed by the raw tensors that have
``binary_data_size``; outputs with ``binary_data``, or all outputs with ``binary_data_output``, are returned the same way.
``serve.api.tensors`` has the tensors.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np
from aiohttp import web
from numpy.typing import NDArray

from serve.access.identity import Scope
from serve.api.admission import Admission, Call
from serve.api.encoding import as_bytes
from serve.api.http_call import Handler, guarded
from serve.api.tensors import (
    INPUTS,
    OUTPUTS,
    PLATFORM,
    Tensors,
    check_input,
    check_parameters,
    check_shape,
    named,
    output_names,
    outputs_of,
    shapes_of,
    to_request,
)
from serve.core.generate import Core
from serve.core.request import Digits
from serve.errors import RequestError, UnavailableError
from serve.settings import release

JSON_BYTES = "Inference-Header-Content-Length"
MAX_BODY_BYTES = 4 << 20  # as over gRPC
ROW_BYTES = 24 * 784  # what a digit takes up in memory until its answer is sent: values as JSON, and before that as objects
EXTENSIONS = ["binary_tensor_data"]

Parameters = dict[str, str | bool | int | float]


class Input(msgspec.Struct):
    """A tensor that is given: ``data``, nested or flat, or the next ``binary_data_size`` bytes behind the JSON."""

    name: str
    datatype: str
    shape: list[int]
    data: Any = None
    parameters: Parameters = {}


class Output(msgspec.Struct):
    """A tensor that is asked for."""

    name: str
    parameters: Parameters = {}


class Inference(msgspec.Struct):
    """A request's JSON."""

    inputs: list[Input]
    id: str = ""
    parameters: Parameters = {}
    outputs: list[Output] = []


class OpenInferenceHttp:
    """The routes. Handlers raise ServeError."""

    def __init__(self, core: Core, admission: Admission, not_ready: Callable[[], str | None]) -> None:
        self._core = core
        self._admission = admission
        self._not_ready = not_ready

    def routes(self) -> list[web.RouteDef]:
        """What to add to the application. Health is open to all, as over gRPC."""
        routes = [
            self._route("GET", "/v2", self._server),
            self._route("GET", "/v2/", self._server),  # as the protocol's published description has it
            self._route("GET", "/v2/health/live", self._live, "open"),
            self._route("GET", "/v2/health/ready", self._ready, "open"),
        ]
        for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            routes += [
                self._route("GET", model, self._model),
                self._route("GET", f"{model}/ready", self._model_ready, "open"),
                self._route("POST", f"{model}/infer", self._infer),
            ]
        return routes

    def _route(self, method: str, path: str, handler: Handler, scope: Scope = "generate") -> web.RouteDef:
        return web.route(method, path, guarded(self._admission, path, handler, scope))

    async def _server(self, request: web.Request, call: Call) -> web.Response:
        return web.json_response({"name": "digits-serve", "version": release(), "extensions": EXTENSIONS})

    async def _live(self, request: web.Request, call: Call) -> web.Response:
        return web.json_response({"live": True})

    async def _ready(self, request: web.Request, call: Call) -> web.Response:
        if reason := self._not_ready():
            raise UnavailableError(reason)
        return web.json_response({"ready": True})

    async def _model(self, request: web.Request, call: Call) -> web.Response:
        manifest = self._core.catalog.find(*_asked(request)).manifest
        taken, given = shapes_of(manifest)
        about = {
            "name": manifest.name,
            "versions": [str(number) for number in self._core.catalog.versions(manifest.name)],
            "platform": PLATFORM,
            "inputs": [{"name": name, "datatype": INPUTS[name].datatype, "shape": shape} for name, shape in taken.items()],
            "outputs": [{"name": name, "datatype": OUTPUTS[name].datatype, "shape": shape} for name, shape in given.items()],
        }
        return web.json_response(about)

    async def _model_ready(self, request: web.Request, call: Call) -> web.Response:
        model = self._core.catalog.find(*_asked(request))
        if not model.ready:
            raise UnavailableError(f"model {model.manifest.name}/{model.manifest.version} is not ready")
        return web.json_response({"name": model.manifest.name, "ready": True})

    async def _infer(self, request: web.Request, call: Call) -> web.Response:
        body = await _body(request)
        inference, rest = _split(body, request.headers.get(JSON_BYTES))
        holders: list[Inference | Input | Output] = [inference, *inference.inputs, *inference.outputs]
        check_parameters(name for holder in holders for name in holder.parameters)
        names = output_names([output.name for output in inference.outputs])
        model, version = request.match_info["model"], request.match_info.get("version", "")
        row_bytes = (4 if "images" in names else 1) * ROW_BYTES
        tensors = read_inputs(inference, rest)
        parsed = to_request(model, version, tensors, names, deadline=call.deadline, size=2 * len(body), row_bytes=row_bytes)
        digits = await self._core.generate(parsed, call.hold)
        started = time.perf_counter()
        answer = await asyncio.to_thread(_encode, inference, digits, names)  # values in JSON take their time
        call.encoded(digits, time.perf_counter() - started)
        return answer


def read_inputs(inference: Inference, rest: memoryview) -> Tensors:
    """The request's tensors by name, shaped; ``rest`` is what follows the JSON. Raises RequestError naming the tensor."""
    tensors: dict[str, NDArray[np.generic]] = {}
    for tensor in inference.inputs:
        name, size = tensor.name, tensor.parameters.get("binary_data_size")
        dtype = np.dtype(check_input(name, tensor.datatype, tensors).dtype)
        if size is None:
            values = _from_json(name, tensor.data, dtype)
        else:
            if tensor.data is not None or not isinstance(size, int) or not 0 <= size <= len(rest):
                raise RequestError(f"inputs: {name} has no binary_data_size of the bytes that follow, or data beside it")
            if size % dtype.itemsize:
                raise RequestError(f"inputs: {name} has {size} bytes, which is no multiple of {dtype.itemsize}")
            values, rest = np.frombuffer(rest[:size], dtype), rest[size:]
        check_shape(name, tensor.shape, values.size)
        tensors[name] = values.reshape(tensor.shape)
    if len(rest):
        raise RequestError(f"{len(rest)} bytes follow the last tensor")
    return tensors


def _from_json(name: str, data: Any, dtype: np.dtype[Any]) -> NDArray[np.generic]:
    """JSON's numbers as an array: whole numbers stay what they are, and do not wrap."""
    try:
        flat = np.array(data, dtype=object).ravel()
        wanted = (int,) if dtype.kind in "iu" else (int, float)
        if data is None or not all(isinstance(value, wanted) and not isinstance(value, bool) for value in flat):
            raise ValueError(name)  # as what numpy raises
        with np.errstate(over="ignore"):  # a float too large is infinite, which is refused later
            return np.array(flat.tolist(), dtype)
    except (ValueError, OverflowError, TypeError):
        kind = "whole numbers" if dtype.kind in "iu" else "numbers"
        raise RequestError(f"inputs: {name}: data must be a list of {kind} of its datatype") from None


async def _body(request: web.Request) -> bytes:
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise RequestError(f"the request is larger than {MAX_BODY_BYTES} bytes") from None


def _split(body: bytes, json_bytes: str | None) -> tuple[Inference, memoryview]:
    """The JSON, and the raw tensors behind it. Raises RequestError."""
    size = len(body)
    if json_bytes is not None:
        size = int(json_bytes) if json_bytes.isascii() and json_bytes.isdecimal() and len(json_bytes) < 10 else -1
        if not 0 <= size <= len(body):
            raise RequestError(f"{JSON_BYTES} must be from 0 to the body's {len(body)} bytes, got {json_bytes[:20]!r}")
    try:
        return msgspec.json.decode(body[:size], type=Inference), memoryview(body)[size:]
    except (ValueError, RecursionError) as error:  # msgspec's are ValueErrors
        raise RequestError(f"the request is not an inference request in JSON: {str(error)[:200]}") from None


def _encode(inference: Inference, digits: Digits, names: list[str]) -> web.Response:
    manifest = digits.model.manifest
    all_raw = inference.parameters.get("binary_data_output") is True
    raw_names = {each.name for each in inference.outputs if each.parameters.get("binary_data", all_raw) is True}
    if all_raw and not inference.outputs:
        raw_names = set(names)
    outputs, raw = [], []
    for name, (shape, pieces) in outputs_of(digits, names).items():
        output: dict[str, Any] = {"name": name, "datatype": OUTPUTS[name].datatype, "shape": shape}
        if name in raw_names:
            content = b"".join(map(as_bytes, pieces))
            output["parameters"] = {"binary_data_size": len(content)}
            raw.append(content)
        else:
            output["data"] = np.concatenate(pieces).ravel().tolist()
        outputs.append(output)
    parameters: dict[str, Any] = dict(inference.parameters)
    if digits.seed is not None:
        parameters |= {"seed": digits.seed, "start": digits.start}
    answer: Mapping[str, Any] = {
        "model_name": manifest.name,
        "model_version": str(manifest.version),
        **({"id": inference.id} if inference.id else {}),
        "parameters": parameters,
        "outputs": outputs,
    }
    head = msgspec.json.encode(answer)
    if not raw:
        return web.Response(body=head, content_type="application/json")
    headers = {JSON_BYTES: str(len(head))}
    return web.Response(body=b"".join((head, *raw)), content_type="application/octet-stream", headers=headers)


def _asked(request: web.Request) -> tuple[str, int]:
    return named(request.match_info["model"], request.match_info.get("version", ""))
