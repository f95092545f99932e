"""The methods of a service, as a server of gRPC's takes them."""

from collections.abc import Mapping
from dataclasses import dataclass

import grpc


@dataclass(frozen=True, slots=True)
class Methods:
    """What a service offers: how each rpc is handled, by the name of the rpc."""

    service: str
    """Its full name."""
    handlers: Mapping[str, "grpc.RpcMethodHandler[bytes, bytes]"]

    def add_to(self, server: grpc.aio.Server) -> None:
        """Has a server offer them. To be done before it starts.

        As registered methods: the server waits for the next call of each of them separately. Those that it does not
        know by name it takes one by one, each after some four turns of the event loop (grpcio 1.85,
        `_server_main_loop`): under load, calls would wait for that in gRPC's core, where nobody sees them, and a health
        check behind a thousand others.
        """
        server.add_registered_method_handlers(self.service, dict(self.handlers))
