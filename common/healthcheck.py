"""`python -m common.healthcheck [HOST:PORT] [SERVICE]`: exit code 0 when grpc.health.v1 there says SERVING, else 1.

For containers, whose engines ask by running a command. Kubernetes asks for itself. The address defaults to
MEMSHARD_HEALTH_ADDRESS, and that to a router's.
"""

import argparse
import os
import sys

import grpc
from grpc_health.v1 import health_pb2

from common.health import SERVICE_NAME

_DEFAULT_ADDRESS = "127.0.0.1:50051"
_TIMEOUT_S = 3.0


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m common.healthcheck", description=__doc__)
    default = os.environ.get("MEMSHARD_HEALTH_ADDRESS", _DEFAULT_ADDRESS)
    parser.add_argument("address", nargs="?", default=default, help=f"HOST:PORT; {default} without")
    parser.add_argument("service", nargs="?", default="", help="the service to ask about; the whole process without")
    arguments = parser.parse_args()
    status = check(arguments.address, arguments.service)
    print(status)
    return 0 if status == "SERVING" else 1


def check(address: str, service: str = "") -> str:
    """The status that is told, or the gRPC code with which the question fails."""
    request = health_pb2.HealthCheckRequest(service=service)
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        ask = channel.unary_unary(
            f"/{SERVICE_NAME}/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        try:
            answer = ask(request, timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code.name
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


if __name__ == "__main__":
    sys.exit(main())
