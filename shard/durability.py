"""What writes are acknowledged with: LOCAL, or QUORUM while a sync set is in force.

A receipt may say QUORUM only when the set was in force from before the commit until after it. So whoever writes notes
the generation before, and asks with it after; the generation changes whenever QUORUM begins or ends.
"""

from memshard.v1 import memory_pb2 as pb


class Durability:
    """Kept by the sync keeper, or with `external` by whoever runs PostgreSQL; asked by every write."""

    def __init__(self, *, external: bool = False) -> None:
        self._external = external
        self._members: frozenset[str] = frozenset()
        self._generation = 0
        self.is_deposed = False
        """Whether the catalog says that another server than the one connected to takes the writes."""

    @property
    def members(self) -> frozenset[str]:
        """The standbys that commits wait for a quorum of; none while that is not certain."""
        return self._members

    def begin(self) -> int:
        """To be noted before a write."""
        return self._generation

    def of_commit(self, begun: int, *, waits: bool) -> "pb.Durability.ValueType":
        """What to acknowledge a commit with that began after `begin` returned `begun`.

        `waits` is whether the server's setting, read after the commit, makes commits wait for standbys.
        """
        quorum = waits and (self._external or (bool(self._members) and begun == self._generation))
        return pb.DURABILITY_QUORUM if quorum else pb.DURABILITY_LOCAL

    def set_quorum(self, members: frozenset[str]) -> None:
        """From now on every commit waits for a quorum of `members`, who are some."""
        if not self._members:
            self._generation += 1
        self._members = members

    def set_local(self) -> None:
        """From now on a commit may be acknowledged that is on the primary alone. Called before that can be so."""
        if self._members:
            self._generation += 1
        self._members = frozenset()
