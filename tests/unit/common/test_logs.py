"""Log lines: JSON with who and when; a bug is described by type and place, never by its text."""

import json
import subprocess
import sys

import pytest

from common.logs import describe_bug

_SECRET = "hunter2"


def _fail() -> None:
    memory = {"content": _SECRET}
    raise ValueError(f"bad content: {memory}")


def _fail_as_a_group() -> None:
    try:
        _fail()
    except ValueError as cause:
        raise ExceptionGroup(_SECRET, [KeyError(_SECRET), cause]) from cause


def test_bug_is_described_by_type_and_place_without_its_text() -> None:
    try:
        _fail()
    except ValueError as error:
        described = describe_bug(error)
    assert described["error"] == "builtins.ValueError"
    places = described["at"].split(" < ")
    assert [place.rsplit(" ", 1)[1] for place in places] == [
        "_fail",
        "test_bug_is_described_by_type_and_place_without_its_text",
    ]
    assert f"{__file__}:{_fail.__code__.co_firstlineno + 2} " in places[0]
    assert _SECRET not in str(described)


def test_causes_and_groups_give_away_no_text_either() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        _fail_as_a_group()
    assert _SECRET not in str(describe_bug(caught.value))


def test_exception_that_was_never_raised_has_no_place() -> None:
    assert describe_bug(KeyError(_SECRET)) == {"error": "builtins.KeyError", "at": ""}


def test_json_lines_say_who_when_and_how_bad() -> None:
    """In a process of its own: setting up logging is for the whole of a process."""
    program = (
        "import logging\n"
        "from common import logs\n"
        "log = logs.get_logger('part')\n"
        "logs.configure('router', 'json', 'info')\n"
        "log.debug('unseen')\n"
        "log.info('seen', count=3)\n"
        "logging.getLogger('library').info('unseen')\n"
        "logging.getLogger('library').warning('from a %s', 'library')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    ours, library = map(json.loads, done.stdout.splitlines())
    assert ours.pop("timestamp").endswith("Z")
    assert ours == {"service": "router", "level": "info", "event": "seen", "count": 3}
    assert (library["event"], library["level"], library["service"]) == ("from a library", "warning", "router")


def test_lines_about_a_call_have_its_trace() -> None:
    """Also those of libraries, and also while no trace is recorded."""
    program = (
        "import logging\n"
        "from common import logs, tracing\n"
        "logs.configure('router', 'json', 'info')\n"
        "log = logs.get_logger('part')\n"
        "parent = '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00'\n"
        "with tracing.received('Service/Rpc', [('traceparent', parent)], begins=True):\n"
        "    log.info('within')\n"
        "    logging.getLogger('library').warning('within')\n"
        "log.info('outside')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60)
    ours, library, outside = map(json.loads, done.stdout.splitlines())
    assert ours["trace_id"] == library["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
    assert "trace_id" not in outside
