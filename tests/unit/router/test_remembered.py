"""What routers tell each other, and what that makes them forget; without a Redis behind them."""

import uuid
from collections.abc import Sequence

import pytest
from pydantic import SecretStr

from common.config import RouterSettings
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from router.consistency import EVENTUAL
from router.envelope import Envelopes
from router.location import LocationCache
from router.memories import Kept, MemoryCache, Question
from router.memories_redis import MemoryRedis
from router.redis_cache import RedisCache
from router.remembered import Remembered
from router.search_cache import KeptResults, SearchCache, SearchKey
from router.stamps import Stamp
from tests.unit.router.test_memory_cache import ONE

ID = str(uuid.uuid4())
SLOT = 7


class Router:
    """One that has a memory and a search of one user, and tells `told`."""

    def __init__(self) -> None:
        settings = RouterSettings(catalog_dsn=SecretStr("postgresql://nowhere"))
        link, envelopes = RedisCache(settings), Envelopes(b"k" * 32)
        memories = MemoryCache(settings, lambda: True)
        self.told: list[str] = []
        self.all = Remembered(
            LocationCache(settings, link=link),
            memories,
            MemoryRedis(settings, link, envelopes, "cluster", memories),
            SearchCache(settings, lambda: True),
            self,
            envelopes,
        )
        said = shard_pb2.ReadStamp(timeline=1, lsn=100)
        stamp = Stamp.of_answer("a", said, memories.now())
        self._question = Question("user-1", ID, include_embedding=False)
        self._key = SearchKey(self.all.user("user-1"), b"digest")
        memory = pb.Memory(id=ID, user_id="user-1", embedding_state=pb.EMBEDDING_STATE_READY)
        memories.remember(self._question, Kept("user-1", SLOT, b"", stamp), memory)
        self.all.searches.remember(self._key, KeptResults(SLOT, b"", stamp), pb.SearchMemoriesResponse())
        self._moment = self.all.locations.moment()
        assert self.has() == (True, True, True)

    def tell_soon(self, said: Sequence[str]) -> None:
        self.told += said

    def has(self) -> tuple[bool, bool, bool]:
        """The memory; the search; and whether a place that is on its way will be remembered."""
        return (
            self.all.memories.find(self._question, EVENTUAL, ONE) is not None,
            self.all.searches.find(self._key, EVENTUAL, ONE) is not None,
            self.all.locations.moment() == self._moment,
        )


def test_a_change_is_forgotten_here_and_told_and_forgotten_there() -> None:
    one, other = Router(), Router()
    with one.all.changing("user-1", ID) as forgetting:
        assert one.has() == (True, True, True)
        forgetting.done("a", shard_pb2.Commit(timeline=1, lsn=200))
    other.all.drop(one.told)
    # Where the memory is has not changed; nor that of any other.
    assert one.has() == other.has() == (False, False, True)


def test_a_change_that_failed_is_forgotten_all_the_same() -> None:
    one = Router()
    with pytest.raises(TimeoutError), one.all.changing("user-1", ID):
        raise TimeoutError
    assert one.has() == (False, False, True)
    assert one.told


def test_a_store_makes_searches_be_forgotten_and_no_memory() -> None:
    one, other = Router(), Router()
    one.all.wrote(["user-2"])
    other.all.drop(one.told)
    assert one.has() == other.has() == (True, True, True)
    one.all.wrote(["user-1"])
    other.all.drop(one.told)
    assert one.has() == other.has() == (True, False, True)
    # Whose it is nobody can read there.
    assert not any("user-1" in said for said in one.told)


def test_an_erasure_is_of_everything() -> None:
    one = Router()
    one.all.drop([one.all.erased("user-1"), ID])
    assert one.has() == (False, False, False)
    assert one.all.searches.size[0] == 0


def test_of_an_erasure_all_hear_who_note_users_also_of_one_who_had_no_memories() -> None:
    one, other = Router(), Router()
    erased: list[str] = []
    one.all.on_erased(erased.append)
    other.all.on_erased(erased.append)
    one.all.erase("user-1")
    assert erased == [one.all.user("user-1")]
    other.all.drop(one.told)
    assert erased == [one.all.user("user-1")] * 2
    assert other.has() == (True, False, True)
    assert not any("user-1" in said for said in one.told)


def test_whoever_lost_the_others_has_nothing_left() -> None:
    one = Router()
    one.all.clear()
    assert one.has() == (False, False, False)
    assert Router().all.flush() == 2
