"""What is fuzzed: everything that reads bytes from outside. A target takes any bytes and raises when it finds a defect.

A defect is a crash, the status INTERNAL, an answer out of proportion, or an allocation beyond the memory limit that
``tests.fuzz`` sets. Half of a message target's inputs are taken as wire bytes; the other half steer a builder that fills
the message's fields, so that the checks behind the parser are reached as well.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import msgspec
import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry
from yarl import URL

from serve.access.budget import Budget
from serve.access.identity import Accounts, Caller
from serve.access.tokens import TokenFile, parse_tokens
from serve.api.admission import Admission
from serve.api.digits_v1 import DigitService
from serve.api.http import DIGITS as DIGITS_QUERY
from serve.api.http import INTERPOLATION as INTERPOLATION_QUERY
from serve.api.http import read_query
from serve.api.open_inference import OpenInferenceService
from serve.api.rpc import Method
from serve.batching.batcher import Batcher, Limits
from serve.core.generate import Core
from serve.dataset.header import parse_header
from serve.errors import BundleError, RequestError, SettingsError, UnauthenticatedError
from serve.latents import SEED_LIMIT, LatentReader, Span
from serve.manifest import BUNDLED_DIR, Golden, parse_manifest
from serve.models.catalog import Catalog
from serve.models.model import Model
from serve.models.reconcile import Reconciler
from serve.models.repository import Repository, read_bundle
from serve.models.serving_file import parse_serving_state, watched_serving_file
from serve.observability.metrics import Metrics
from serve.observability.model_metrics import ModelMetrics
from serve.pb.digits.v1 import digits_pb2
from serve.pb.inference import open_inference_pb2
from serve.settings import DEFAULT_MODEL, Settings
from tests.fake_wire import FakeWire
from train.data.files import read_idx
from train.errors import DataError

MAX_COUNT = 64
LATENT_SIZE = 100  # of the default model
MOST_ANSWER_BYTES = 4 * MAX_COUNT * 784 * 5 + 10_000  # typed float contents are the largest
MESSAGE_DEPTH = 4
CHUNKS_READ = 3

Target = Callable[[bytes], None]


class DefectError(AssertionError):
    """Something that no input may bring about."""


class BlankEngine:
    """A model whose digits are blank: what is fuzzed is the way there and back."""

    launches_ahead = False

    def launch(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Callable[[], dict[str, NDArray[Any]]]:
        return partial(self.run, feeds, outputs)

    def assemble(self, reader: LatentReader, spans: Sequence[Span], count: int) -> dict[str, NDArray[Any]]:
        feeds = {"latents": np.zeros((count, LATENT_SIZE), np.float32), "labels": np.zeros(count, np.int64)}
        reader.fill(feeds["latents"], spans, feeds["labels"])
        return feeds

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        labels = feeds["labels"]
        if labels.min() < 0 or labels.max() > 9:
            raise DefectError(f"labels from {labels.min()} to {labels.max()} reached the model")
        count = len(labels)
        rows = {"pixels": np.zeros((count, 28, 28), np.uint8), "images": np.zeros((count, 1, 28, 28), np.float32)}
        return {name: rows[name] for name in outputs}

    def bucket(self, count: int) -> int:
        return count


class Server:
    """The services over one blank model, without a wire."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        weakref.finalize(self, self._loop.close)
        settings = Settings(max_count=MAX_COUNT, max_queue_images=1 << 16)
        metrics = Metrics(CollectorRegistry())
        catalog = Catalog(DEFAULT_MODEL)
        admission = Admission(metrics, Accounts(None, 0, 0.0), Budget(1 << 30))
        core = Core(catalog, settings.max_count, settings.max_count_float32)
        serving = watched_serving_file(BUNDLED_DIR / "serving.json")
        status = Reconciler(Repository(BUNDLED_DIR), serving, catalog, settings, metrics).status
        workers = ThreadPoolExecutor(1)
        tables = {
            "digits": DigitService(core, status).table(admission, workers),
            "inference": OpenInferenceService(core, lambda: None, metrics, status).table(admission, workers),
        }
        self.methods = {
            name: {path.rpartition("/")[2]: method for path, method in table.methods.items()} for name, table in tables.items()
        }
        self._loop.run_until_complete(self._open(catalog, metrics))

    async def _open(self, catalog: Catalog, metrics: Metrics) -> None:
        bundle = read_bundle(BUNDLED_DIR / DEFAULT_MODEL / "1")
        observer = ModelMetrics(metrics, DEFAULT_MODEL, 1)
        limits = Limits(
            latent_size=LATENT_SIZE, labels=10, max_batch_size=16, max_queue_images=1 << 16, linger_s=0.0,
            instances=1, watchdog_s=60.0,
        )  # fmt: skip
        batcher = Batcher(limits, BlankEngine, observer)
        batcher.start()
        catalog.put(Model(bundle, "cpu", batcher, observer))

    def call(self, method: Method, raw: bytes) -> None:
        """One call. Raises DefectError."""
        wire = FakeWire(most=CHUNKS_READ)
        if method.begin is not None:
            method.begin(wire, raw)
        else:
            assert method.task is not None
            with suppress(asyncio.CancelledError):
                self._loop.run_until_complete(method.task(wire, raw))
        if wire.ended() is grpc.StatusCode.INTERNAL:
            raise DefectError(f"INTERNAL: {wire.text}")
        if sum(map(len, wire.answers)) > CHUNKS_READ * MOST_ANSWER_BYTES:
            raise DefectError("an answer of too many bytes")
        if len(wire.text) > 1000 or "\n" in wire.text:
            raise DefectError(f"not a one-line text: {wire.text!r}")


def message_target(call: Callable[[str, bytes], None], requests: Mapping[str, type[Message]]) -> Target:
    """The first byte picks the method and whether the rest is wire bytes or steers a builder."""
    methods = sorted(requests)

    def target(data: bytes) -> None:
        picked, rest = (data[0], data[1:]) if data else (0, b"")
        method = methods[(picked >> 1) % len(methods)]
        if picked & 1:
            message = requests[method]()
            fill(message, Reader(rest), MESSAGE_DEPTH)
            rest = message.SerializeToString()
        call(method, rest)

    return target


class Reader:
    """Takes numbers and pieces out of bytes; zeros when they are used up."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int) -> bytes:
        piece = self._data[self._at : self._at + size]
        self._at += size
        return piece.ljust(size, b"\0")

    def below(self, limit: int) -> int:
        return self.take(1)[0] % limit


WORDS = (
    b"mlp", b"dcgan", b"", b"latents", b"seed", b"count", b"start", b"pixels", b"images", b"FP32", b"UINT64", b"INT32", b"1",
    b"\0", b"../mlp", bytes(256), bytes(4), bytes(8),
)  # fmt: skip
NUMBERS = (0, 1, 2, 5, 28, 64, MAX_COUNT, MAX_COUNT + 1, 1 << 20, 1 << 31, (1 << 31) - 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def fill(message: Message, reader: Reader, depth: int) -> None:
    """Set some of a message's fields, odd values among them."""
    for field in message.DESCRIPTOR.fields:
        if reader.below(3) == 0:
            continue
        repeats = reader.below(5) if field.is_repeated else 1
        for _ in range(repeats):
            set_field(message, field, reader, depth)


def set_field(message: Message, field: FieldDescriptor, reader: Reader, depth: int) -> None:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        if depth:
            fill(getattr(message, field.name)[WORDS[reader.below(len(WORDS))].decode()], reader, depth - 1)
        return
    if field.message_type is not None:
        if depth:
            target = getattr(message, field.name)
            fill(target.add() if field.is_repeated else target, reader, depth - 1)
        return
    value = value_for(field, reader)
    if field.is_repeated:
        getattr(message, field.name).append(value)
    else:
        setattr(message, field.name, value)


def value_for(field: FieldDescriptor, reader: Reader) -> Any:
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING:
        word = WORDS[reader.below(len(WORDS))] if reader.below(2) else reader.take(reader.below(80))
        return word if field.type == FieldDescriptor.TYPE_BYTES else word.decode("utf-8", "ignore")
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return bool(reader.below(2))
    if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return float(np.frombuffer(reader.take(4), np.float32)[0])
    number = NUMBERS[reader.below(len(NUMBERS))] if reader.below(2) else int.from_bytes(reader.take(3), "little", signed=True)
    bits = 64 if kind in (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64) else 32
    unsigned = number % (1 << bits)
    is_unsigned = kind in (FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_UINT64)
    return unsigned if is_unsigned or unsigned < 1 << (bits - 1) else unsigned - (1 << bits)


def reader_target(read: Callable[[bytes, str], object], error: type[Exception]) -> Target:
    """A reader that may refuse, in one line that names the source, and do nothing else."""

    def target(data: bytes) -> None:
        try:
            read(data, "somewhere")
        except error as refusal:
            if not str(refusal).startswith("somewhere") or "\n" in str(refusal) or len(str(refusal)) > 1000:
                raise DefectError(f"not a one-line text: {refusal}") from None

    return target


def json_target(read: Callable[[bytes, str], object], error: type[Exception], example: Mapping[str, Any]) -> Target:
    """As ``reader_target``; half the inputs steer what is changed in a valid document."""
    plain = reader_target(read, error)

    def target(data: bytes) -> None:
        if data and data[0] & 1:
            document = copy.deepcopy(dict(example))
            spoil(document, Reader(data[1:]))
            data = json.dumps(document).encode()
        plain(data)

    return target


def spoil(value: Any, reader: Reader) -> None:
    """Replace, drop or add some of a document's values."""
    places = list(value) if isinstance(value, dict) else range(len(value))
    for place in places:
        choice = reader.below(12)
        if isinstance(value[place], dict | list) and choice < 8:
            spoil(value[place], reader)
        elif choice == 9:
            value[place] = odd_value(reader)
        elif choice == 10 and isinstance(value, dict):
            del value[place]
        elif choice == 11 and isinstance(value, dict):
            value[reader.take(4).decode("latin1")] = odd_value(reader)


def odd_value(reader: Reader) -> Any:
    text = reader.take(reader.below(64)).decode("latin1")
    numbers = (-1, 0, 1, 1e308, float("nan"), 10**30)
    odd = (None, True, *numbers, "", text, [], [text], {}, {text: text}, "A" * 1000, "AAAA", "\ud800")
    return odd[reader.below(len(odd))]


def small_manifest() -> dict[str, Any]:
    """The bundled mlp's manifest with one golden sample: short enough to be spoiled everywhere."""
    manifest = read_bundle(BUNDLED_DIR / "mlp" / "1").manifest
    golden = Golden(count=1, latents=manifest.golden.latents[: 64 * 4], labels=b"", pixels=manifest.golden.pixels[:784])
    document: dict[str, Any] = json.loads(msgspec.structs.replace(manifest, golden=golden, training={"step": 1}).to_json())
    return document


SERVING = {
    "schema_version": 1,
    "models": {
        "mlp": {"versions": [1, 2], "route": {"default": 1, "canary": 2, "canary_share": 0.1}, "previous": [{"default": 2}]},
        "dcgan": {"versions": "latest:2"},
    },
}
TOKENS = {"tokens": [{"name": "a", "sha256": "ab" * 32, "scopes": ["generate"], "expires": "2030-01-01T00:00:00Z", "images": 5}]}

DIGITS = {
    "Generate": digits_pb2.GenerateRequest,
    "GenerateStream": digits_pb2.GenerateStreamRequest,
    "Interpolate": digits_pb2.InterpolateRequest,
    "ListModels": digits_pb2.ListModelsRequest,
    "GetModel": digits_pb2.GetModelRequest,
    "Status": digits_pb2.StatusRequest,
}
INFERENCE = {
    "ModelInfer": open_inference_pb2.ModelInferRequest,
    "ModelMetadata": open_inference_pb2.ModelMetadataRequest,
    "ModelReady": open_inference_pb2.ModelReadyRequest,
    "RepositoryIndex": open_inference_pb2.RepositoryIndexRequest,
}


DATASET = {
    "model": "mlp", "version": 1, "digest": "0" * 64, "seed": 7, "start": 5, "count": 40, "shards": 3, "height": 28, "width": 28,
    "latent_size": 64, "classes": 10, "labels": [1, 2, 3],
}  # fmt: skip


def read_dataset(content: bytes, where: str) -> None:
    """A data set's header, and what is done with one that is accepted."""
    dataset = parse_header(content, where)
    ranges = [dataset.shard_range(shard) for shard in {0, dataset.shards // 2, dataset.shards - 1}]
    if any(count < 0 for _, count in ranges):
        raise DefectError(f"a shard of less than nothing: {ranges}")
    dataset.rows(dataset.start, 1)


def query_target(data: bytes) -> None:
    """The part of a URL after its question mark; the first byte picks the path."""
    known = INTERPOLATION_QUERY if data[:1] == b"\1" else DIGITS_QUERY
    try:
        query = URL.build(path="/", query_string=data[1:].decode("utf-8", "surrogateescape"), encoded=True).query
    except ValueError:  # the HTTP server refuses it before
        return
    try:
        values = read_query(query, known)
    except RequestError as refusal:
        if "\n" in str(refusal) or len(str(refusal)) > 1000:
            raise DefectError(f"not a one-line text: {refusal}") from None
        return
    if not all(0 <= values.get(name, 0) < SEED_LIMIT for name in ("seed", "start", "to_seed", "to_start", "count", "steps")):
        raise DefectError(f"out of range: {values}")


def bearer_target() -> Target:
    """What a caller may send for ``authorization``, zero bytes between its values; the first byte: text, or bytes."""
    secret = "jobs.open-sesame"
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-tokens-")) / "tokens.json"
    entry = {"name": "jobs", "sha256": hashlib.sha256(secret.encode()).hexdigest(), "scopes": ["generate"]}
    scratch.write_text(json.dumps({"tokens": [entry]}))
    accounts = Accounts(TokenFile(scratch), 0, 0.0)

    def target(data: bytes) -> None:
        parts = data[1:].split(b"\0")
        values: list[str | bytes] = [*parts] if data[:1] == b"\1" else [part.decode("utf-8", "surrogateescape") for part in parts]
        try:
            account = accounts.admit(Caller(lambda: "127.0.0.1", values), "generate")
        except UnauthenticatedError as refusal:
            if "\n" in str(refusal) or len(str(refusal)) > 1000 or secret in str(refusal):
                raise DefectError(f"not a one-line text: {refusal!r}") from None
            return
        if len(values) != 1 or not str(values[0]).endswith(secret):
            raise DefectError(f"{values} is let in as {account.name}")

    return target


def make_target(name: str) -> Target:
    """The target of that name. Raises KeyError."""
    if name in ("digits", "inference"):
        server = Server()
        table = server.methods[name]
        requests: Mapping[str, type[Message]] = {"digits": DIGITS, "inference": INFERENCE}[name]
        return message_target(lambda method, raw: server.call(table[method], raw), requests)
    readers: dict[str, Callable[[], Target]] = {
        "manifest": lambda: json_target(parse_manifest, BundleError, small_manifest()),
        "serving": lambda: json_target(parse_serving_state, SettingsError, SERVING),
        "tokens": lambda: json_target(parse_tokens, SettingsError, TOKENS),
        "header": lambda: json_target(read_dataset, SettingsError, DATASET),
        "idx": lambda: reader_target(read_idx, DataError),
        "query": lambda: query_target,
        "bearer": bearer_target,
    }
    return readers[name]()


NAMES = ("digits", "inference", "manifest", "serving", "tokens", "header", "idx", "query", "bearer")


def seeds(name: str) -> Iterable[bytes]:
    """Inputs to begin with: right ones, for the fuzzer to spoil."""
    generate = digits_pb2.GenerateRequest(count=3, seed=7, start=5, labels=[1, 2, 3], truncation=0.5)
    latents = digits_pb2.GenerateRequest(latents=np.ones((2, LATENT_SIZE), "<f4").tobytes(), labels=[7], format=2)
    stream = digits_pb2.GenerateStreamRequest(count=40, chunk=16, labels=[4, 2])
    ends = digits_pb2.Address(seed=1, index=2), digits_pb2.Address(seed=3, index=4)
    arc = digits_pb2.InterpolateRequest(begin=ends[0], end=ends[1], steps=9, labels=[5])
    tensor = open_inference_pb2.ModelInferRequest.InferInputTensor
    infer = open_inference_pb2.ModelInferRequest(
        model_name=DEFAULT_MODEL,
        inputs=[tensor(name="seed", datatype="UINT64", shape=[1]), tensor(name="count", datatype="INT32", shape=[1])],
        raw_input_contents=[bytes(8), b"\x03\0\0\0"],
    )
    idx = b"\0\0\x08\x03\0\0\0\x02\0\0\0\x1c\0\0\0\x1c" + bytes(2 * 784)
    steering = [bytes([picked]) + bytes(range(1, 120)) for picked in range(1, 9, 2)]
    pick = {"Generate": 0, "GenerateStream": 2, "Interpolate": 6, "ModelInfer": 0}
    return {
        "digits": [
            bytes([pick["Generate"]]) + generate.SerializeToString(),
            bytes([pick["Generate"]]) + latents.SerializeToString(),
            bytes([pick["GenerateStream"]]) + stream.SerializeToString(),
            bytes([pick["Interpolate"]]) + arc.SerializeToString(),
            *steering,
        ],
        "inference": [bytes([pick["ModelInfer"]]) + infer.SerializeToString(), *steering],
        "manifest": [json.dumps(small_manifest()).encode(), *steering],
        "serving": [json.dumps(SERVING).encode(), *steering],
        "tokens": [json.dumps(TOKENS).encode(), *steering],
        "header": [json.dumps(DATASET).encode(), *steering],
        "idx": [idx],
        "query": [
            b"\0count=3&seed=7&start=5&labels=1,2,3&truncation=0.5&format=png&model=cdcgan&version=1",
            b"\1seed=1&to_seed=2&steps=9&start=4&to_start=18446744073709551615",
        ],
        "bearer": [b"\0Bearer jobs.secret", b"\0bearer  jobs.", b"\1Basic am9iczpzZWNyZXQ=", b"\2Bearer a.b\0Bearer a.b"],
    }[name]
