"""Whether an environment is what a service wants: read by the service's own settings, as it would at its start."""

import os
from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

from common import config
from common.config import SETTINGS


def service_of(command: list[str]) -> str | None:
    """The service that a command starts, like `router` of `python -m router`; None for another command."""
    return command[2] if command[:2] == ["python", "-m"] and command[2] in SETTINGS else None


def settings_of(service: str, environment: Mapping[str, str]) -> Any:
    """The settings. Raises ConfigError, or AssertionError for a variable that looks like a setting and is none."""
    prefix = SETTINGS[service].model_config["env_prefix"]
    known = {f"{prefix}{name}".upper() for name in SETTINGS[service].model_fields}
    unknown = {name for name in environment if name.startswith(prefix)} - known
    assert not unknown, f"{service} has no such settings: {sorted(unknown)}"
    with patch.dict(os.environ, environment, clear=True):
        return config.load(SETTINGS[service])
