"""Properties have no time limit of their own: on a busy machine one example can take a second.

In CI the examples are the same each time, so that a change is judged by what it changes; everywhere else they are new
ones each time, which is how faults are found that nobody thought of.
"""

import os
import uuid

import pytest
from hypothesis import settings

settings.register_profile("memshard", deadline=None, print_blob=True)
settings.register_profile("memshard-ci", settings.get_profile("memshard"), derandomize=True)
settings.load_profile("memshard-ci" if os.environ.get("CI") else "memshard")


@pytest.fixture
def user() -> str:
    """A user that nobody else has."""
    return f"user-{uuid.uuid4()}"
