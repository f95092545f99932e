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


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_an_exception_that_a_library_logs_is_described_by_type_and_place_too(log_format: str) -> None:
    program = (
        "import asyncio, gc, logging\n"
        "from common import logs\n"
        f"logs.configure('router', '{log_format}', 'info')\n"
        "async def fail(content):\n"
        "    raise ValueError('bad: ' + content)\n"
        "def answer(content):\n"
        "    raise LookupError(content)\n"
        "async def main(secret):\n"
        "    failed = asyncio.create_task(fail(secret))\n"
        "    asyncio.get_running_loop().call_soon(answer, secret)\n"
        "    await asyncio.wait([failed])\n"
        "    del failed\n"
        "    gc.collect()\n"
        f"asyncio.run(main('{_SECRET}'))\n"
        "try:\n"
        f"    answer('{_SECRET}')\n"
        "except LookupError as error:\n"
        "    logging.getLogger('library').exception('failed for %s', error)\n"
        "    logging.getLogger('library').error(f'failed again: {error}', exc_info=error)\n"
        "    logs.get_logger('part').exception('ours', count=3)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert _SECRET not in done.stdout
    lines = done.stdout.splitlines()
    said = [
        "Exception in callback answer",
        "Task exception was never retrieved",
        "failed for %s",
        "failed again",
        "ours",
    ]
    assert [phrase in line for phrase, line in zip(said, lines, strict=True)] == [True] * 5
    errors = ["builtins.LookupError", "builtins.ValueError", *3 * ["builtins.LookupError"]]
    assert [error in line for error, line in zip(errors, lines, strict=True)] == [True] * 5
    assert all("<string>:" in line for line in lines)
    if log_format == "json":
        assert [json.loads(line)["event"] for line in lines] == said
