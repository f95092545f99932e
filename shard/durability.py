"""What writes are acknowledged with: LOCAL, or QUORUM while a sync set is in force.

A receipt may say QUORUM only when the set was in force from before the commit until after it, on the server that
committed. So whoever writes notes the generation before, and asks with it after; the generation changes whenever QUORUM
begins or ends. And a set is in force on one server, as the primary of one timeline: its successor waits for nobody
until it has been told to, and may have taken writes before anybody here has noticed it.
"""

from common.errors import Unavailable
from memshard.v1 import memory_pb2 as pb
from shard.position import Position

_RETRY_AFTER_S = 1.0


class Durability:
    """Kept by the sync keeper, or with `external` by whoever runs PostgreSQL; asked by every write."""

    def __init__(self, *, external: bool = False) -> None:
        self._external = external
        self._members: frozenset[str] = frozenset()
        self._primary = ("", 0)
        self._generation = 0
        self._deposed = 0

    @property
    def members(self) -> frozenset[str]:
        """The standbys that commits wait for a quorum of; none while that is not certain."""
        return self._members

    @property
    def is_external(self) -> bool:
        """Whether nobody here keeps the setting: then it has to be read before a write, too."""
        return self._external

    def begin(self) -> int:
        """To be noted before a write."""
        return self._generation

    def of_commit(self, begun: int, here: Position, before: Position | None = None) -> "pb.Durability.ValueType":
        """What to acknowledge a commit with that began after `begin` returned `begun`.

        `here` is the position read after the commit, on its own connection; `before` the one from before it, if any.
        """
        in_force = bool(self._members) and begun == self._generation and (here.server, here.timeline) == self._primary
        waits = here.waits and (before is None or before.waits)
        quorum = waits and (self._external or in_force)
        return pb.DURABILITY_QUORUM if quorum else pb.DURABILITY_LOCAL

    def set_quorum(self, members: frozenset[str], server: str, timeline: int) -> None:
        """From now on every commit of `server` on `timeline` waits for a quorum of `members`, who are some."""
        if not self._members or (server, timeline) != self._primary:
            self._generation += 1
        self._members, self._primary = members, (server, timeline)

    def depose(self, timeline: int) -> None:
        """Another server takes the writes than that which writes `timeline`, by the catalog; 0: none is known of."""
        self._deposed = timeline

    def require_primary(self, timeline: int) -> None:
        """Raises Unavailable when the server that writes `timeline` is not, by the catalog, the one that takes writes.

        It stays so until the catalog says otherwise: that it cannot be asked just now makes nobody primary again.
        """
        if timeline <= self._deposed:
            raise Unavailable(
                "another server is to take the writes", reason="NOT_PRIMARY", retry_after_s=_RETRY_AFTER_S
            )

    def set_local(self) -> None:
        """From now on a commit may be acknowledged that is on the primary alone. Called before that can be so."""
        if self._members:
            self._generation += 1
        self._members = frozenset()
