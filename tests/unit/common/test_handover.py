"""Claiming a port for a start that is no handover: nobody listens on it before, and no other claim comes between."""

import socket

import pytest

from common.handover import claimed

_HOST = "127.0.0.1"


def listener(host: str = _HOST, port: int = 0, *, shares: bool) -> socket.socket:
    """Listens as servers do; with SO_REUSEPORT if it `shares`."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shares)
    made.bind((host, port))
    made.listen()
    return made


@pytest.fixture
def port() -> int:
    """A free one."""
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        number: int = probe.getsockname()[1]
    return number


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("host", [_HOST, "0.0.0.0", "localhost"])
def test_a_port_that_somebody_listens_on_is_refused_though_he_would_share_it(host: str, shares: bool) -> None:
    with (
        listener(shares=shares) as stranger,
        pytest.raises(OSError, match="in use"),
        claimed(host, stranger.getsockname()[1]),
    ):
        pass


def test_within_a_claim_a_server_that_shares_comes_to_the_port_and_no_other_claim(port: int) -> None:
    with claimed(_HOST, port):
        with pytest.raises(OSError, match="in use"), claimed(_HOST, port):
            pass
        server = listener(port=port, shares=True)
    with server:
        with pytest.raises(OSError, match="in use"), claimed(_HOST, port):
            pass
        with socket.create_connection((_HOST, port)) as caller, server.accept()[0] as accepted:
            assert accepted.getpeername() == caller.getsockname()


def test_a_claim_of_every_address_lets_a_server_on_both_families_in(port: int) -> None:
    """As gRPC listens for 0.0.0.0."""
    with claimed("0.0.0.0", port), socket.create_server(("::", port), family=socket.AF_INET6, reuse_port=True):
        pass


def test_connections_of_an_earlier_server_that_are_still_closing_are_no_obstacle(port: int) -> None:
    with listener(port=port, shares=False) as server, socket.create_connection((_HOST, port)):
        server.accept()[0].close()  # The side that closes first waits for stray segments.
    with claimed(_HOST, port):
        pass


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_what_else_is_wrong_with_an_address_is_left_to_the_server(host: str, port: int) -> None:
    with claimed(host, port):
        pass
