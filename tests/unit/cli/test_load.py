"""`memshard load`: what is wrong with a profile is said before anything starts."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "profiles that come with memshard: agents, smoke, zipf-reads"),
        (["agents", "--processes", "30"], "concurrency must be at least processes"),
        (["smoke", "--rate", "2000000"], "rate"),
    ],
)
def test_what_is_wrong_with_a_profile_is_said(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["load", *arguments])
    assert result.exit_code == 2
    assert said in result.output


def test_every_field_at_fault_is_named(tmp_path: Path) -> None:
    profile = tmp_path / "wrong.yaml"
    profile.write_text("operations: {serch: 1}\nconcurrency: 2\ndata: {user: 3}\n")
    result = CliRunner().invoke(app, ["load", str(profile)])
    assert result.exit_code == 2
    assert "operations.serch" in result.output
    assert "data.user" in result.output
