import json
import stat
from pathlib import Path

import pytest

from common.embedder import LocalEmbedder
from common.local_model import LOCAL_DIMENSIONS
from local.errors import DataDirectoryError, OptionsError
from local.layout import Layout
from local.record import Options, Record, Secrets, load_record, load_secrets, settle

KEPT = Record(
    shards=2, embedder="local", embedder_model="wordllama-l2-supercat-256", dimensions=256, ports={"redis": 20001}
)
HTTP = Record(shards=2, embedder="http", embedder_model="m", embedder_url="http://a/v1", dimensions=1536)


def test_a_cluster_to_which_shards_have_come_is_never_taken_for_unfinished(tmp_path: Path) -> None:
    layout = Layout.of(tmp_path / "d")
    layout.claim()
    KEPT.save(layout)
    assert not load_record(layout).complete
    grown, _ = KEPT.with_new_shard()
    grown.save(layout)
    assert load_record(layout).complete


def test_defaults_of_a_new_cluster() -> None:
    made = settle(Options(), None)
    assert (made.shards, made.replicas, made.embedder, made.dimensions) == (2, 1, "local", 256)
    assert made.embedder_model == "wordllama-l2-supercat-256"
    assert not made.complete


@pytest.mark.parametrize("dimensions", [64, 128, 256])
def test_the_local_model_is_named_with_its_dimensions(dimensions: int) -> None:
    assert settle(Options(dimensions=dimensions), None).embedder_model == f"wordllama-l2-supercat-{dimensions}"


def test_the_local_model_is_the_routers() -> None:
    for dimensions in LOCAL_DIMENSIONS:
        made = settle(Options(dimensions=dimensions), None)
        routers = LocalEmbedder(dimensions)
        assert (made.embedder_model, made.dimensions) == (routers.model, routers.dimensions)


def test_callers_that_bring_embeddings_have_no_model() -> None:
    made = settle(Options(embedder="none"), None)
    assert (made.embedder_model, made.dimensions) == ("", 1536)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (Options(shards=0), "--shards"),
        (Options(shards=65), "--shards"),
        (Options(replicas=-1), "--replicas"),
        (Options(replicas=9), "--replicas"),
        (Options(dimensions=100), "--dimensions"),
        (Options(embedder="none", dimensions=4001), "--dimensions"),
        (Options(embedder="none", dimensions=0), "--dimensions"),
        (Options(embedder="http", embedder_url="http://a/v1"), "--embedder-model"),
        (Options(embedder="http", embedder_model="m"), "--embedder-url"),
        (Options(shards=3, weights="1,2"), "one for each of the 3 shards"),
        (Options(shards=0, weights="1,2"), "--shards"),
        (Options(weights=",".join("1" * 65)), "--shards"),
        *(
            (Options(weights=text), "--weights must be")
            for text in (
                "",
                ",",
                "1,",
                "1,,2",
                "0,1",
                "1,1001",
                "1,-1",
                "1.5,1",
                "a,b",
                "1;2",
                "1_0,1",
                "\u0661,1",
                "9" * 5000,
            )
        ),
        (Options(embedder_model="m"), "--embedder http only"),
        (Options(embedder="none", embedder_url="http://a/v1"), "--embedder http only"),
    ],
)
def test_options_that_make_no_cluster(options: Options, named: str) -> None:
    with pytest.raises(OptionsError, match=named):
        settle(options, None)


def test_weights_are_the_shards_shares_and_say_how_many_there_are() -> None:
    made = settle(Options(weights="1, 2,1"), None)
    assert (made.shards, [made.weight_of(shard_id) for shard_id in made.shard_ids()]) == (3, [1, 2, 1])
    assert settle(Options(shards=3, weights="1,2,1"), made) == made
    assert settle(Options(), made) == made
    with pytest.raises(OptionsError, match="--weights 1,2,1, not 1,1,1"):
        settle(Options(weights="1,1,1"), made)


def test_shards_without_weights_have_one_each() -> None:
    assert [KEPT.weight_of(shard_id) for shard_id in KEPT.shard_ids()] == [1, 1]
    assert settle(Options(weights="1,1"), KEPT) == KEPT
    with pytest.raises(OptionsError, match="--weights 1,1, not 1,2"):
        settle(Options(weights="1,2"), KEPT)


def test_what_is_not_given_stays_as_it_was() -> None:
    assert settle(Options(), KEPT) == KEPT
    assert settle(Options(shards=2, embedder="local", dimensions=256), KEPT) == KEPT


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (Options(shards=3), "--shards 2, not 3"),
        (Options(replicas=1), "--replicas 0, not 1"),
        (Options(embedder="none"), "--embedder local, not none"),
        (Options(dimensions=64), "--dimensions 256, not 64"),
        (Options(embedder_model="m"), "--embedder-model wordllama-l2-supercat-256, not m"),
    ],
)
def test_a_contradiction_says_what_the_cluster_was_made_with_and_what_to_do(options: Options, said: str) -> None:
    with pytest.raises(OptionsError) as raised:
        settle(options, KEPT)
    assert said in str(raised.value)
    assert "--data-dir" in str(raised.value)


def test_the_address_of_an_embedder_may_change() -> None:
    assert settle(Options(embedder_url="http://b/v1"), HTTP).embedder_url == "http://b/v1"
    with pytest.raises(OptionsError, match="--embedder http only"):
        settle(Options(embedder_url="http://b/v1"), KEPT)


def test_record_and_secrets_come_back_and_are_private(tmp_path: Path) -> None:
    layout = Layout.of(tmp_path)
    secrets = Secrets.generate()
    KEPT.save(layout)
    secrets.save(layout)
    assert load_record(layout) == KEPT
    assert load_secrets(layout) == secrets
    assert stat.S_IMODE(layout.secrets.stat().st_mode) == 0o600
    assert secrets.redis not in repr(secrets)
    assert secrets.redis not in f"{secrets}"


def test_a_cluster_from_before_there_were_standbys_has_none_and_gets_their_password(tmp_path: Path) -> None:
    layout = Layout.of(tmp_path)
    layout.record.write_text(KEPT.model_dump_json(exclude={"replicas"}))
    layout.secrets.write_text(Secrets.generate().model_dump_json(exclude={"memshard_replication"}))
    assert settle(Options(), load_record(layout)).server_names("shard-0") == ["postgres-shard-0"]
    before = load_secrets(layout)
    after = before.completed()
    assert after.memshard_replication
    assert after.completed() == after
    assert after.redis == before.redis


def test_the_servers_of_a_shard_have_names_that_say_nothing_of_their_roles() -> None:
    record = settle(Options(replicas=2), None)
    assert record.server_names("shard-1") == ["postgres-shard-1", "postgres-shard-1-1", "postgres-shard-1-2"]
    assert record.replica_names("shard-1") == ["shard-1-replica-1", "shard-1-replica-2"]


@pytest.mark.parametrize("text", ["", "{", json.dumps({"shards": 2}), "[]", "\udcff"])
def test_a_damaged_record_is_said_to_be(tmp_path: Path, text: str) -> None:
    layout = Layout.of(tmp_path)
    layout.record.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataDirectoryError, match=r"cluster\.json is damaged"):
        load_record(layout)
