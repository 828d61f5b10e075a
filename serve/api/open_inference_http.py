"""The Open Inference Protocol v2 over HTTP: ``/v2/…`` in JSON, with tensors in JSON or, by the binary extension, as raw bytes.

With ``Inference-Header-Content-Length`` the body starts with that many bytes of JSON, followed by the raw tensors that have
``binary_data_size``; outputs with ``binary_data``, or all outputs with ``binary_data_output``, are returned the same way.
``serve.api.tensors`` has the tensors.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import msgspec
import numpy as np
from aiohttp import web
from msgspec import Meta
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
from serve.command_line import release
from serve.core.generate import Core
from serve.core.request import Digits
from serve.errors import RequestError, UnavailableError

JSON_BYTES = "Inference-Header-Content-Length"
MAX_BODY_BYTES = 4 << 20  # as over gRPC
ROW_BYTES = 24 * 784  # what a digit takes up in memory until its answer is sent: values as JSON, and before that as objects
BODY_COPIES = 2  # of its bytes, in memory: as they came, and as numbers
SMALL_BODY_BYTES = 64 << 10  # read at once; reading what is larger would hold up others on the event loop
MOST_VALUES = 1 << 20  # of a tensor in JSON
VALUES_AT_ONCE = 1 << 14  # written in one step, in which no other thread runs
EXTENSIONS = ["binary_tensor_data"]

# What may be left out may be null as well: MLServer's client writes whole objects.
Parameters = Annotated[dict[str, str | bool | int | float | None], Meta(max_length=64)] | None


class Input(msgspec.Struct):
    """A tensor that is given: ``data``, nested or flat, or the next ``binary_data_size`` bytes behind the JSON."""

    name: str
    datatype: str
    shape: Annotated[list[int], Meta(max_length=8)]
    data: msgspec.Raw = msgspec.Raw()
    parameters: Parameters = None


class Output(msgspec.Struct):
    """A tensor that is asked for."""

    name: str
    parameters: Parameters = None


class Inference(msgspec.Struct):
    """A request's JSON."""

    inputs: Annotated[list[Input], Meta(max_length=16)]
    id: str | None = None
    parameters: Parameters = None
    outputs: Annotated[list[Output], Meta(max_length=16)] | None = None


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
        call.hold.take(0, BODY_COPIES * min(request.content_length or MAX_BODY_BYTES, MAX_BODY_BYTES))  # before it is read
        body, encoding = await _body(request), request.headers.get("Content-Encoding", "identity").strip().lower()
        read = partial(read_inference, body, encoding, request.headers.get(JSON_BYTES))
        in_thread = len(body) > SMALL_BODY_BYTES or encoding != "identity"
        inference, tensors, names = await asyncio.to_thread(read) if in_thread else read()
        model, version = request.match_info["model"], request.match_info.get("version", "")
        row_bytes = (4 if "images" in names else 1) * ROW_BYTES
        parsed = to_request(model, version, tensors, names, deadline=call.deadline, row_bytes=row_bytes)
        call.asks(parsed)
        digits = await self._core.generate(parsed, call.hold)
        started = time.perf_counter()
        answer = await asyncio.to_thread(_encode, inference, digits, names)  # values in JSON take their time
        call.encoded(digits, time.perf_counter() - started)
        return answer


def read_inference(body: bytes, encoding: str, json_bytes: str | None) -> tuple[Inference, Tensors, list[str]]:
    """A request's body: its JSON, its tensors, and the outputs that it asks for. Raises RequestError."""
    inference, rest = _split(_decompressed(body, encoding), json_bytes)
    asked = inference.outputs or []
    holders: list[Inference | Input | Output] = [inference, *inference.inputs, *asked]
    check_parameters(name for holder in holders for name in holder.parameters or ())
    names = output_names([output.name for output in asked])
    return inference, read_inputs(inference, rest), names


def read_inputs(inference: Inference, rest: memoryview) -> Tensors:
    """The request's tensors by name, shaped; ``rest`` is what follows the JSON. Raises RequestError naming the tensor."""
    tensors: dict[str, NDArray[np.generic]] = {}
    for tensor in inference.inputs:
        name, size = tensor.name, (tensor.parameters or {}).get("binary_data_size")
        dtype = np.dtype(check_input(name, tensor.datatype, tensors).dtype)
        if size is None:
            values = _from_json(name, tensor, dtype)
        else:
            if bytes(tensor.data) not in (b"", b"null") or not isinstance(size, int) or not 0 <= size <= len(rest):
                raise RequestError(f"inputs: {name} has no binary_data_size of the bytes that follow, or data beside it", name)
            if size % dtype.itemsize:
                raise RequestError(f"inputs: {name} has {size} bytes, which is no multiple of {dtype.itemsize}", name)
            values, rest = np.frombuffer(rest[:size], dtype), rest[size:]
        check_shape(name, tensor.shape, values.size)
        tensors[name] = values.reshape(tensor.shape)
    if len(rest):
        raise RequestError(f"{len(rest)} bytes follow the last tensor", "inputs")
    return tensors


def _from_json(name: str, tensor: Input, dtype: np.dtype[Any]) -> NDArray[np.generic]:
    """JSON's numbers, nested or flat, as an array. How many there are is checked before any is made."""
    whole = dtype.kind in "iu"
    flat = bytes(tensor.data).translate(None, b"[] \t\r\n")
    given = flat.count(b",") + 1
    if given > MOST_VALUES:
        raise RequestError(
            f"inputs: {name} has {given} numbers, over {MOST_VALUES}; send them as bytes (binary_data_size)", name, MOST_VALUES
        )
    try:
        check_shape(name, tensor.shape, given)
        values = msgspec.json.decode(b"[" + flat + b"]", type=list[int] if whole else list[float])
        with np.errstate(over="ignore"):  # a float too large is infinite, which is refused later
            return np.array(values, dtype)
    except (ValueError, OverflowError):  # msgspec's are ValueErrors
        kind = "whole numbers" if whole else "numbers"
        raise RequestError(f"inputs: {name}: data must be a list of {kind} of its datatype", name) from None


async def _body(request: web.Request) -> bytes:
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise RequestError(f"the request is larger than {MAX_BODY_BYTES} bytes", "", MAX_BODY_BYTES) from None
    except web.RequestPayloadError:
        raise RequestError("the request's body is not as its headers say", "") from None


def _decompressed(body: bytes, encoding: str) -> bytes:
    if encoding == "identity":
        return body
    stream = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib, as it says itself
    try:
        whole = stream.decompress(body, MAX_BODY_BYTES + 1)
    except zlib.error:
        raise RequestError(f"the request's body is not {encoding}, as its Content-Encoding says", "Content-Encoding") from None
    if len(whole) > MAX_BODY_BYTES:
        raise RequestError(f"the request is larger than {MAX_BODY_BYTES} bytes", "", MAX_BODY_BYTES)
    if not stream.eof or stream.unused_data:
        raise RequestError(
            f"the request's body is not one whole {encoding} stream, as its Content-Encoding says", "Content-Encoding"
        )
    return whole


def _split(body: bytes, json_bytes: str | None) -> tuple[Inference, memoryview]:
    """The JSON, and the raw tensors behind it. Raises RequestError."""
    size = len(body)
    if json_bytes is not None:
        size = int(json_bytes) if json_bytes.isascii() and json_bytes.isdecimal() and len(json_bytes) < 10 else -1
        if not 0 <= size <= len(body):
            raise RequestError(
                f"{JSON_BYTES} must be from 0 to the body's {len(body)} bytes, got {json_bytes[:20]!r}", JSON_BYTES
            )
    try:
        return msgspec.json.decode(body[:size], type=Inference), memoryview(body)[size:]
    except (ValueError, RecursionError) as error:  # msgspec's are ValueErrors
        raise RequestError(f"the request is not an inference request in JSON: {str(error)[:200]}", "") from None


def _encode(inference: Inference, digits: Digits, names: list[str]) -> web.Response:
    manifest = digits.model.manifest
    parameters: dict[str, Any] = dict(inference.parameters or {})
    all_raw, asked = parameters.get("binary_data_output") is True, inference.outputs or []
    raw_names = {each.name for each in asked if (each.parameters or {}).get("binary_data", all_raw) is True}
    if all_raw and not asked:
        raw_names = set(names)
    outputs, raw = [], []
    for name, (shape, pieces) in outputs_of(digits, names).items():
        output: dict[str, Any] = {"name": name, "datatype": OUTPUTS[name].datatype, "shape": shape}
        if name in raw_names:
            content = b"".join(map(as_bytes, pieces))
            output["parameters"] = {"binary_data_size": len(content)}
            raw.append(content)
        else:
            output["data"] = _as_json(pieces)
        outputs.append(output)
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


def _as_json(pieces: Sequence[NDArray[Any]]) -> msgspec.Raw:
    """Their values as one flat list."""
    flat = [piece.ravel() for piece in pieces]
    parts = (values[first : first + VALUES_AT_ONCE] for values in flat for first in range(0, values.size, VALUES_AT_ONCE))
    return msgspec.Raw(b"[" + b",".join(msgspec.json.encode(part.tolist())[1:-1] for part in parts) + b"]")


def _asked(request: web.Request) -> tuple[str, int]:
    return named(request.match_info["model"], request.match_info.get("version", ""))
