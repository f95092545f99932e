"""Properties have no time limit of their own: on a busy machine one example can take a second.

In CI the examples are the same each time, so that a change is judged by what it changes; everywhere else they are new
ones each time, which is how faults are found that nobody thought of.
"""

import os
import signal
import uuid

import pytest
from hypothesis import settings

# Before grpc is imported: tests start processes while they use gRPC, whose handlers for fork would end some of them.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

# Tests interrupt commands as their users do. Who was started in the background ignores that, and so would its children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("memshard", deadline=None, print_blob=True)
settings.register_profile("memshard-ci", settings.get_profile("memshard"), derandomize=True)
settings.load_profile("memshard-ci" if os.environ.get("CI") else "memshard")


@pytest.hookimpl(tryfirst=True)  # Before -m picks by the marks.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Who goes to which worker.

    Tests that share a cluster go to one, so that it is started once: those of a file and, across files, those of one
    kind of cluster. What takes longest begins first. Fault scenarios have the machine to themselves (`make test`).
    """
    for item in items:
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        item.add_marker(pytest.mark.xdist_group(params.get("everywhere", item.location[0])))
        if item.location[0].startswith("tests/faults/"):
            item.add_marker(pytest.mark.alone)
    items.sort(key=lambda item: "test_model" not in item.location[0])


def pytest_collection_finish(session: pytest.Session) -> None:
    """Groups that are not kept together fail nothing at first, and then this or that (pytest-xdist, issue 1386)."""
    if session.config.getoption("loadgroup", False) and not all("@" in item.nodeid for item in session.items):
        raise pytest.UsageError("this pytest-xdist does not keep groups together with this pytest; see constraints.txt")


@pytest.fixture
def user() -> str:
    """A user that nobody else has."""
    return f"user-{uuid.uuid4()}"
