"""What a call costs with more shards: the sums, and what counts as a miss."""

import pytest

from loadtest.bench.shards import Cost, ratios, table


def _costs(router_us: float, fan_out_us: float, shard_us: float) -> dict[str, Cost]:
    return {
        "get": Cost(10, 100.0, router_us, 300.0),
        "search": Cost(10, 100.0, router_us, 300.0),
        "fan-out": Cost(10, 100.0, fan_out_us, shard_us),
    }


def test_a_fan_out_is_measured_by_the_shards_that_it_asks() -> None:
    costs = {1: _costs(500, 600, 400), 2: _costs(510, 900, 700), 8: _costs(540, 4000, 4800)}
    measured = [ratio.measured for ratio in ratios(costs)]
    assert measured == pytest.approx([1.08, 1.08, 4000 / 8 / 600, 4800 / 8 / 400])


def test_what_costs_more_than_it_may_is_marked() -> None:
    text = table({1: _costs(500, 600, 400), 8: _costs(600, 4000, 4800)})
    missed = [line for line in text.splitlines() if "**missed**" in line]
    assert [line.split(" | ")[0] for line in missed] == [
        "| router's time for a get",
        "| router's time for a search",
        "| shard's time for its part of a fan-out",
    ]
    assert "| 8 | fan-out | 100 | 4,000 | 500 | 600 |" in text
