"""A cache that is bounded in bytes and in time, beside one that is not."""

from hypothesis import given
from hypothesis import strategies as st

from router.bounded_cache import BoundedCache
from tests.support.clock import Clock

_MAX = 64_000
_keys = st.integers(0, 30)
_steps = st.one_of(
    st.tuples(st.just("put"), _keys, st.integers(0, 9_000), st.floats(0, 10)),
    st.tuples(st.just("get"), _keys, st.just(0), st.just(0.0)),
    st.tuples(st.just("pop"), _keys, st.just(0), st.just(0.0)),
    st.tuples(st.just("wait"), st.just(0), st.just(0), st.floats(0, 5)),
    st.tuples(st.just("clear"), st.just(0), st.just(0), st.just(0.0)),
)


@given(st.lists(_steps, max_size=80))
def test_what_is_found_was_put_last_and_lately_and_all_of_it_has_room(
    steps: list[tuple[str, int, int, float]],
) -> None:
    clock = Clock()
    cache: BoundedCache[int, int] = BoundedCache(_MAX, clock)
    put: dict[int, tuple[int, float]] = {}
    for number, (step, key, size_bytes, seconds) in enumerate(steps):
        if step == "put":
            cache.put(key, number, size_bytes=size_bytes, ttl_s=seconds)
            put[key] = (number, clock() + seconds)
        elif step == "get":
            found = cache.get(key)
            if found is not None:
                number_put, until = put[key]
                assert found == number_put
                assert clock() < until
        elif step == "pop":
            cache.pop(key)
            put.pop(key, None)
        elif step == "wait":
            clock.pass_(seconds)
        else:
            cache.clear()
            put.clear()
        assert 0 <= cache.size_bytes <= _MAX
        assert (cache.size_bytes == 0) == (len(cache) == 0)


def test_what_was_used_longest_ago_goes_first() -> None:
    cache: BoundedCache[str, str] = BoundedCache(20_000, Clock())
    for key in "abcdefgh":
        cache.put(key, key, size_bytes=1_000, ttl_s=60)
    assert cache.get("a") == "a"
    cache.put("i", "i", size_bytes=1_000, ttl_s=60)
    cache.put("j", "j", size_bytes=1_000, ttl_s=60)
    cache.put("k", "k", size_bytes=1_000, ttl_s=60)
    assert cache.get("b") is None
    assert cache.get("a") == "a"


def test_what_is_too_large_leaves_nothing_of_its_key_and_all_others() -> None:
    cache: BoundedCache[str, str] = BoundedCache(20_000, Clock())
    cache.put("a", "small", size_bytes=10, ttl_s=60)
    cache.put("b", "small", size_bytes=10, ttl_s=60)
    cache.put("a", "large", size_bytes=15_000, ttl_s=60)
    assert (cache.get("a"), cache.get("b")) == (None, "small")


def test_without_room_nothing_is_kept() -> None:
    cache: BoundedCache[str, str] = BoundedCache(0, Clock())
    cache.put("a", "a", size_bytes=0, ttl_s=60)
    assert (cache.get("a"), len(cache)) == (None, 0)


def test_what_meets_a_condition_goes() -> None:
    cache: BoundedCache[str, int] = BoundedCache(20_000, Clock())
    for number, key in enumerate("abc"):
        cache.put(key, number, size_bytes=10, ttl_s=60)
    cache.pop_where(lambda key, value: key == "a" or value == 2)
    assert [cache.get(key) for key in "abc"] == [None, 1, None]
    assert cache.size_bytes > 0
