"""Generates the Python stubs of proto/ into a folder: `python sdk/generate_stubs.py [FOLDER]` (default: sdk/)."""

import sys
from pathlib import Path

from google.rpc import status_pb2
from grpc_tools import protoc

_ROOT = Path(__file__).resolve().parent.parent
_PROTO = _ROOT / "proto"
# google/rpc/*.proto lie beside the modules that googleapis-common-protos generated from them.
_GOOGLE_RPC = Path(status_pb2.__file__).resolve().parents[2]
# The plugins of mypy-protobuf are installed beside the interpreter, which need not be on PATH.
_BIN = Path(sys.executable).parent
_WELL_KNOWN = Path(protoc.__file__).resolve().parent / "_proto"


def generate(out: Path) -> None:
    """Writes a `_pb2.py` and a `_pb2_grpc.py`, each with its `.pyi`, for every .proto file.

    Raises SystemExit with protoc's code when a file does not compile; protoc says why on standard error.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = sorted(str(path.relative_to(_PROTO)) for path in _PROTO.rglob("*.proto"))
    code = protoc.main(
        [
            "protoc",
            f"--proto_path={_PROTO}",
            f"--proto_path={_GOOGLE_RPC}",
            f"--proto_path={_WELL_KNOWN}",
            f"--python_out={out}",
            f"--grpc_python_out={out}",
            f"--plugin=protoc-gen-mypy={_BIN / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={_BIN / 'protoc-gen-mypy_grpc'}",
            f"--mypy_out=quiet:{out}",
            f"--mypy_grpc_out=quiet:{out}",
            *files,
        ]
    )
    if code:
        raise SystemExit(code)
    for folder in {parent for stub in out.rglob("*_pb2.py") for parent in stub.parents}:
        # memshard/ itself is the client, written by hand.
        if folder.is_relative_to(out / "memshard") and folder != out / "memshard":
            (folder / "__init__.py").touch()


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else _ROOT / "sdk")
