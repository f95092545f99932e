import itertools
import socket

import pytest

from local.errors import PortInUseError
from local.ports import FIRST, LAST, choose, is_free, require_free


def test_kept_ports_stay() -> None:
    assert choose(["a", "b"], {"a": 20001, "b": 20002}, free=lambda _: True) == {"a": 20001, "b": 20002}


def test_a_port_that_a_stranger_took_is_replaced_by_one_that_nobody_else_keeps() -> None:
    picks = iter([20002, 20003])
    chosen = choose(
        ["a", "b"],
        {"a": 20001, "b": 20002},
        free=lambda port: port != 20001,
        pick=lambda _first, _last: next(picks),
    )
    assert chosen == {"a": 20003, "b": 20002}


def test_the_routers_ports_are_left_alone() -> None:
    picks = itertools.count(20001)
    chosen = choose(["a", "b"], {"a": 20001}, avoid=[20001, 20002], free=lambda _: True, pick=lambda *_: next(picks))
    assert chosen == {"a": 20003, "b": 20004}


def test_new_ports_lie_below_those_of_outgoing_connections() -> None:
    chosen = choose([str(number) for number in range(20)], {}, free=lambda _: True)
    assert len(set(chosen.values())) == 20
    assert all(FIRST <= port <= LAST for port in chosen.values())


def test_no_free_port_is_an_error() -> None:
    with pytest.raises(PortInUseError):
        choose(["a"], {}, free=lambda _: False)


def test_a_port_is_free_until_somebody_listens() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        listener.listen()
        assert not is_free(port)
        with pytest.raises(PortInUseError, match="--port"):
            require_free([port])
    assert is_free(port)


def test_a_listener_on_all_addresses_takes_the_port_too() -> None:
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        assert not is_free(listener.getsockname()[1])
