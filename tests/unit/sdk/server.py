"""A real gRPC server in this process, with handlers given by the test: the wire is never mocked."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from memshard.v1 import memory_pb2 as pb

Handler = Callable[[Any, grpc.ServicerContext], Message]

_SERVICE = pb.DESCRIPTOR.services_by_name["MemoryService"]


@contextmanager
def serving(**handlers: Handler) -> Iterator[str]:
    """A server on a free port that answers the rpcs named by the keywords; gives its address."""
    server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
    for name, handler in handlers.items():
        request = getattr(pb, _SERVICE.methods_by_name[name].input_type.name)
        methods[name] = grpc.unary_unary_rpc_method_handler(
            handler, request_deserializer=request.FromString, response_serializer=lambda m: m.SerializeToString()
        )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE.full_name, methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(grace=None).wait()


def status(code: grpc.StatusCode, message: str, *details: Message) -> status_pb2.Status:
    """A google.rpc.Status with these details."""
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    return status_pb2.Status(code=code.value[0], message=message, details=packed)


def info(reason: str, domain: str = "memshard") -> error_details_pb2.ErrorInfo:
    """The detail that carries a machine reason."""
    return error_details_pb2.ErrorInfo(reason=reason, domain=domain)
