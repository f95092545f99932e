import os
import stat
from pathlib import Path

import pytest

from local.account import Account, make_traversable
from local.errors import DataDirectoryError

OTHER = Account("other", 54321, 54321)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root runs PostgreSQL as another user")


def test_directories_below_the_temporary_one_are_opened(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    make_traversable(closed / "data", OTHER)
    assert stat.S_IMODE(closed.stat().st_mode) == 0o701


def test_directories_elsewhere_are_somebodys_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/nonexistent")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    tmp_path.chmod(0o755)
    with pytest.raises(DataDirectoryError, match="--data-dir"):
        make_traversable(closed / "data", OTHER)
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700


def test_a_plain_user_needs_none_of_it(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    make_traversable(tmp_path / "data", None)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700
