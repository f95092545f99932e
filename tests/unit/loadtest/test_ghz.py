"""The configurations for ghz: each names an rpc of the contract and has a request for it, and no rpc is missing."""

import json
import re
import uuid
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from google.protobuf.message_factory import GetMessageClass

from memshard.v1 import memory_pb2 as pb
from router import validate

_DIRECTORY = Path(__file__).resolve().parents[3] / "loadtest" / "ghz"
_FILES = sorted(file for file in _DIRECTORY.iterdir() if file.suffix in {".json", ".yaml"})
_SERVICE = pb.DESCRIPTOR.services_by_name["MemoryService"]
# What ghz knows (github.com/bojand/ghz, runner/config.go): a misspelt option would be ignored by it without a word.
_OPTIONS = {"name", "call", "host", "insecure", "total", "concurrency", "connections", "timeout", "data"}
# ghz's call template data and functions (ghz.sh/docs/calldata), as far as they are used.
_TEMPLATES = (
    (re.compile(r'\{\{printf "%012d" \.RequestNumber\}\}'), "000000000007"),
    (re.compile(r"\{\{\.RequestNumber\}\}"), "7"),
    (re.compile(r"\{\{newUUID\}\}"), str(uuid.UUID(int=7, version=4))),
    (re.compile(r"\{\{randomInt \d+ \d+\}\}"), "3"),
    (re.compile(r"\{\{randomString \d+ \d+\}\}"), "abcdefghij"),
)


def _config(file: Path) -> dict[str, Any]:
    text = file.read_text(encoding="utf-8")
    document: dict[str, Any] = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    return document


def _filled(value: Any) -> Any:
    """The data with ghz's templates carried out."""
    if isinstance(value, dict):
        return {key: _filled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item) for item in value]
    if isinstance(value, str):
        for pattern, result in _TEMPLATES:
            value = pattern.sub(result, value)
        assert "{{" not in value, f"a template that nobody knows: {value}"
    return value


def _method(config: dict[str, Any]) -> str:
    service, _, method = str(config["call"]).rpartition(".")
    assert service == _SERVICE.full_name
    return method


def _request(config: dict[str, Any]) -> Any:
    method = _SERVICE.methods_by_name[_method(config)]
    return json_format.ParseDict(_filled(config["data"]), GetMessageClass(method.input_type)())


@pytest.mark.parametrize("file", _FILES, ids=lambda file: file.name)
def test_a_configuration_is_a_request_of_the_contract(file: Path) -> None:
    config = _config(file)
    assert config.keys() == _OPTIONS
    assert _request(config).ByteSize() > 0


def test_no_rpc_is_missing() -> None:
    assert {_method(_config(file)) for file in _FILES} == {method.name for method in _SERVICE.methods}


@pytest.mark.parametrize("name", ["get.yaml", "update.yaml", "versions.yaml", "delete.yaml"])
def test_what_is_asked_for_is_what_was_stored(name: str) -> None:
    stored = _request(_config(_DIRECTORY / "store.json")).memory
    asked = _request(_config(_DIRECTORY / name))
    asked = asked.memory if name == "update.yaml" else asked
    assert (asked.id, asked.user_id) == (stored.id, stored.user_id)
    assert validate.memory_id(asked.id, "id") == asked.id


def test_a_misspelt_field_is_found() -> None:
    with pytest.raises(json_format.ParseError):
        json_format.ParseDict({"user": "ghz"}, pb.GetMemoryRequest())
