"""gRPC server reflection, v1 and v1alpha: the same messages under two names, of which grpcio has only the older."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import reflection, reflection_pb2

from serve.api.rpc import Method, Wire, parse, refused
from serve.api.status import refusal
from serve.api.wire_format import check_size
from serve.errors import RequestError

V1ALPHA, V1 = "grpc.reflection.v1alpha", "grpc.reflection.v1"


def reflection_methods(services: Collection[str]) -> dict[str, Method]:
    """What answers reflection about the services, and about itself, by path."""
    _describe_v1()
    names = sorted({*services, f"{V1ALPHA}.ServerReflection", f"{V1}.ServerReflection"})
    servicer = reflection.aio.ReflectionServicer(names, _Pool())

    async def answer(wire: Wire, raw: bytes | None) -> None:
        requests = (_parsed(request) async for request in wire.requests())
        try:
            responses: Any = servicer.ServerReflectionInfo(requests, None)
            async for response in responses:
                await wire.send(response.SerializeToString())
        except RequestError as error:
            refused(wire, refusal(error))()
        else:
            wire.ending(grpc.StatusCode.OK)()

    method = Method(task=answer, streams_requests=True)
    return {f"/{package}.ServerReflection/ServerReflectionInfo": method for package in (V1ALPHA, V1)}


class _Pool:
    """protobuf's pool of descriptors, which finds methods too, as grpcurl asks for them; Python's own finds all but these."""

    _pool = descriptor_pool.Default()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def FindFileContainingSymbol(self, symbol: str) -> Any:  # noqa: N802 (protobuf's name)
        """The file of a message, a field, an enum, a service or a method. Raises KeyError."""
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            return self._pool.FindMethodByName(symbol).containing_service.file


def _parsed(request: bytes) -> reflection_pb2.ServerReflectionRequest:
    check_size(request, {})
    return parse(reflection_pb2.ServerReflectionRequest, request)


def _describe_v1() -> None:
    """Make v1 known to protobuf: v1alpha's file under its own package."""
    file = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    file.name, file.package = "grpc/reflection/v1/reflection.proto", V1
    for message in file.message_type:
        for field in filter(lambda each: each.type_name, message.field):
            field.type_name = field.type_name.replace(f".{V1ALPHA}.", f".{V1}.")
    for service in file.service:
        for method in service.method:
            method.input_type = method.input_type.replace(f".{V1ALPHA}.", f".{V1}.")
            method.output_type = method.output_type.replace(f".{V1ALPHA}.", f".{V1}.")
    descriptor_pool.Default().AddSerializedFile(file.SerializeToString())
