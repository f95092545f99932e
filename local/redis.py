"""The embedded Redis: a cache, so it stores nothing and forgets the least used when it is full."""

from pathlib import Path

from local.layout import Layout, write_atomically
from local.ports import HOST

# A million locations of about 150 bytes each.
MAX_MEMORY = "256mb"


def write_settings(layout: Layout, port: int, password: str) -> Path:
    """Writes Redis's configuration, which holds its password; returns the file."""
    file = layout.config / "redis.conf"
    lines = [
        f"bind {HOST}",
        f"port {port}",
        "protected-mode yes",
        f"requirepass {password}",
        f'dir "{_quoted(layout.redis)}"',
        "daemonize no",
        'save ""',
        "appendonly no",
        f"maxmemory {MAX_MEMORY}",
        "maxmemory-policy allkeys-lru",
        "always-show-logo no",
    ]
    write_atomically(file, "\n".join(lines) + "\n", durable=False)
    return file


def url(port: int, password: str) -> str:
    """Redis's URL for the routers."""
    return f"redis://:{password}@{HOST}:{port}/0"


def _quoted(path: Path) -> str:
    return str(path).replace("\\", "\\\\").replace('"', '\\"')
