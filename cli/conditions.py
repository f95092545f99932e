"""Conditions as people type them, `metadata.topic=tea`, made into the SDK's filters."""

import json
import re
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import reduce
from operator import and_, eq, ge, gt, le, lt, ne
from typing import Annotated, Any, Final

import typer

from memshard import Filter, InvalidArgument
from memshard.filters import Field, field

_CONDITION: Final = re.compile(r"\s*([^=!<>~]*[^=!<>~\s])\s*(!=|<=|>=|=|<|>|~)\s*(.*?)\s*", re.DOTALL)
_OPERATORS: Final[dict[str, Callable[[Any, Any], Any]]] = {
    "=": eq,
    "!=": ne,
    "<": lt,
    "<=": le,
    ">": gt,
    ">=": ge,
    "~": Field.contains,
}


def parse_condition(text: str) -> Filter:
    """One comparison: a field, one of = != < <= > >= ~ (contains), and a value.

    In metadata a value is a JSON scalar if it reads as one, else a string: `tea` and `"5"` are strings, `5` and `true`
    are not. A time without a zone is in UTC. Raises typer.BadParameter for anything else.
    """
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise typer.BadParameter("must be a field, one of = != < <= > >= ~, and a value, as in metadata.topic=tea")
    name, operator, value = match.groups()
    try:
        condition: Filter = _OPERATORS[operator](field(name), _value(name, value))
    except InvalidArgument as error:
        raise typer.BadParameter(str(error)) from None
    return condition


def all_of(conditions: Iterable[Filter] | None) -> Filter | None:
    """The filter that wants all of these; None for none."""
    given = list(conditions or ())
    return reduce(and_, given) if given else None


Conditions = Annotated[
    list[Any] | None,
    typer.Option(
        "--filter",
        parser=parse_condition,
        metavar="CONDITION",
        help="Only what meets it: metadata.topic=tea, importance>=0.5, agent_id~bot. Repeated, all must hold.",
    ),
]


def _value(name: str, text: str) -> object:
    if name.endswith("_time") and not name.startswith("metadata."):
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            raise typer.BadParameter(f"{name} is compared with a time such as 2030-01-31T12:00:00Z") from None
        return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    if name == "type":
        return text.upper()
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return text
    # The other fields but importance are strings, also where they look like numbers.
    is_text = not name.startswith("metadata.") and name != "importance"
    if isinstance(value, dict | list) or (is_text and not isinstance(value, str)):
        return text
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")
