"""gRPC server reflection, v1 and v1alpha: the same messages under two names, of which grpcio has only the older."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import reflection, reflection_pb2

V1ALPHA, V1 = "grpc.reflection.v1alpha", "grpc.reflection.v1"


def add_reflection(services: Collection[str], server: Any) -> None:
    """Answer reflection about the services, and about itself."""
    _describe_v1()
    names = sorted({*services, f"{V1ALPHA}.ServerReflection", f"{V1}.ServerReflection"})
    servicer = reflection.aio.ReflectionServicer(names)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    methods = {"ServerReflectionInfo": handler}
    for package in (V1ALPHA, V1):
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(f"{package}.ServerReflection", methods),))


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
