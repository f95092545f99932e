"""Making a lost catalog again from what the shards say: who they are, what they own, and where slots went."""

from collections.abc import Sequence
from pathlib import Path

from common.config import MoverSettings


async def rebuild(
    settings: MoverSettings,
    shards: Sequence[tuple[str, str]],
    replicas: Sequence[tuple[str, str]],
    token_key_file: Path | None,
) -> int:
    """To come."""
    raise NotImplementedError
