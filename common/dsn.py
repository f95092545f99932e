"""Taking PostgreSQL URLs apart: they may name several servers, of which one takes writes."""

import re
from urllib.parse import unquote, urlsplit

_DEFAULT_PORT = 5432
_SERVER = re.compile(r"(?:\[(?P<address>[^\[\]]+)\]|(?P<name>[^:\[\]]*))(?::(?P<port>[0-9]{1,5}))?")


def hosts(dsn: str) -> list[tuple[str, int]]:
    """The servers that a URL names, in its order; none when it names them elsewhere, like in `?host=`.

    Raises ValueError for a URL that cannot be taken apart, with nothing of it in the message.
    """
    _, _, spec = urlsplit(dsn).netloc.rpartition("@")
    return [_host(part) for part in spec.split(",")] if spec else []


def location(dsn: str) -> str:
    """Hosts, ports and database of a URL, for messages: never its user or password."""
    return ",".join(f"{host}:{port}" for host, port in hosts(dsn)) + urlsplit(dsn).path


def _host(part: str) -> tuple[str, int]:
    server = _SERVER.fullmatch(part)
    if server is None or not 0 < (port := int(server["port"] or _DEFAULT_PORT)) < 65536:
        raise ValueError("not a host and a port")
    return unquote(server["address"] or server["name"]) or "localhost", port
