"""UUIDv7 ids: RFC 9562's layout, strict growth, no repetition."""

import threading
import uuid
from itertools import pairwise

from memshard.ids import IdGenerator, new_id


def test_id_is_a_canonical_uuid_of_version_7_and_the_rfc_variant() -> None:
    made = uuid.UUID(new_id())
    assert made.version == 7
    assert made.variant == uuid.RFC_4122


def test_id_carries_the_milliseconds_and_the_counter() -> None:
    generator = IdGenerator(clock_ns=lambda: 0x0123_4567_89AB * 1_000_000 + 999_999, random_bits=lambda bits: 0)
    assert generator.new_id() == "01234567-89ab-7000-8000-000000000000"
    assert generator.new_id() == "01234567-89ab-7000-8000-000100000000"


def test_ids_grow_when_the_clock_stands_still_or_goes_back() -> None:
    clock = iter([5_000_000, 5_000_000, 3_000_000, 0, 6_000_000])
    generator = IdGenerator(clock_ns=lambda: next(clock))
    ids = [generator.new_id() for _ in range(5)]
    assert all(earlier < later for earlier, later in pairwise(ids))


def test_full_counter_moves_on_to_the_next_millisecond() -> None:
    generator = IdGenerator(clock_ns=lambda: 1_000_000, random_bits=lambda bits: (1 << bits) - 1)
    first = generator.new_id()
    generator._counter = (1 << 42) - 1
    second = generator.new_id()
    assert first < second
    assert second.startswith("00000000-0002-7")


def test_ids_of_many_threads_are_distinct_and_grow_within_each() -> None:
    made: list[list[str]] = [[] for _ in range(8)]

    def work(mine: list[str]) -> None:
        mine.extend(new_id() for _ in range(2_000))

    threads = [threading.Thread(target=work, args=(mine,)) for mine in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({one for mine in made for one in mine}) == 16_000
    assert all(earlier < later for mine in made for earlier, later in pairwise(mine))
