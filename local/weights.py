"""The shards' shares of the slots beside each other, as `--weights 1,2,1` says them."""

from collections.abc import Sequence

from local.errors import OptionsError

MAX_WEIGHT = 1000


def parse(text: str) -> tuple[int, ...]:
    """One weight for each shard, in order. Raises OptionsError."""
    parts = [part.strip() for part in text.split(",")]
    digits = len(str(MAX_WEIGHT))
    if all(part.isascii() and part.isdecimal() and len(part) <= digits for part in parts):
        weights = tuple(map(int, parts))
        if all(1 <= weight <= MAX_WEIGHT for weight in weights):
            return weights
    raise OptionsError(f"--weights must be whole numbers from 1 to {MAX_WEIGHT} with commas between, like 1,2,1")


def shown(weights: Sequence[int]) -> str:
    """As they are given."""
    return ",".join(map(str, weights))
