"""The generated code in the SDK is what protoc makes of proto/ today, no more and no less."""

import subprocess
import sys
from pathlib import Path

_SDK = Path(__file__).resolve().parents[2] / "sdk"


def test_generated_stubs_are_exactly_the_checked_in_ones(tmp_path: Path) -> None:
    subprocess.run([sys.executable, _SDK / "generate_stubs.py", tmp_path], check=True, timeout=60)
    made, kept = _generated(tmp_path), _generated(_SDK)
    assert made, "nothing was generated"
    assert kept.keys() - made.keys() == set(), "stale: no .proto file makes these any more; delete them"
    assert made.keys() - kept.keys() == set(), "missing: run `make proto`"
    assert [name for name in made if made[name] != kept[name]] == [], "out of date: run `make proto`"


def _generated(root: Path) -> dict[str, bytes]:
    """Stubs and the marker files of their packages, by path; the SDK's own hand-written modules are left out."""
    packages = {path.parent for path in root.rglob("*_pb2*.py*") if path.suffix in (".py", ".pyi")}
    packages |= {parent for package in packages for parent in package.parents if (root / "memshard") in parent.parents}
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for package in packages
        for path in package.iterdir()
        if path.suffix in (".py", ".pyi")
    }
