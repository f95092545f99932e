"""The token that a call of the admin service has to bring: whoever may read the file may change the cluster."""

import secrets

from local.errors import DataDirectoryError
from local.layout import Layout, write_atomically

_TOKEN_BYTES = 32


def make_token(layout: Layout) -> str:
    """The token of this cluster, made when there is none yet. Raises DataDirectoryError."""
    if not layout.admin_token.exists():
        write_atomically(layout.admin_token, secrets.token_urlsafe(_TOKEN_BYTES) + "\n", durable=True)
    return read_token(layout)


def read_token(layout: Layout) -> str:
    """Raises DataDirectoryError."""
    try:
        token = layout.admin_token.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise DataDirectoryError(f"{layout.admin_token}: {error.strerror}; was the cluster started, by you?") from error
    if not token:
        raise DataDirectoryError(f"{layout.admin_token} is empty: remove it, and start the cluster again")
    return token
