"""The decoder of etcd's large responses, against the one that protobuf makes from etcd's stubs."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from meshnet.store import Change, KeyValue
from meshnet.store import _etcd_messages as messages  # before etcd3: it sets the environment
from meshnet.store._etcd_wire import fields

from etcd3 import etcdrpc  # isort: skip
from etcd3.etcdrpc import kv_pb2  # isort: skip

INT64 = st.integers(0, (1 << 63) - 1)
KEY_VALUES = st.builds(
    kv_pb2.KeyValue,
    key=st.binary(max_size=200),
    value=st.binary(max_size=300),
    create_revision=INT64,
    mod_revision=INT64,
    version=INT64,
    lease=INT64,
)
HEADERS = st.builds(
    etcdrpc.ResponseHeader,
    cluster_id=st.integers(0, (1 << 64) - 1),
    member_id=st.integers(0, (1 << 64) - 1),
    revision=INT64,
    raft_term=st.integers(0, (1 << 64) - 1),
)
EVENTS = st.builds(
    kv_pb2.Event,
    type=st.sampled_from([kv_pb2.Event.PUT, kv_pb2.Event.DELETE]),
    kv=KEY_VALUES,
    prev_kv=st.none() | KEY_VALUES,
)


def text(key: bytes) -> str:
    return key.decode("utf-8", "surrogateescape")


@given(
    st.builds(
        etcdrpc.RangeResponse,
        header=HEADERS,
        kvs=st.lists(KEY_VALUES, max_size=5),
        more=st.booleans(),
        count=INT64,
    )
)
@example(etcdrpc.RangeResponse())
def test_a_page(response: messages.Message) -> None:
    page = messages.page(response.SerializeToString())
    assert page.items == tuple(
        KeyValue(text(kv.key), kv.value, kv.mod_revision, kv.lease) for kv in response.kvs
    )
    header = response.header
    assert (page.more, page.revision, page.cluster_id) == (
        response.more,
        header.revision,
        header.cluster_id,
    )


@given(
    st.builds(
        etcdrpc.WatchResponse,
        header=HEADERS,
        watch_id=st.sampled_from([-1, 0, 1]),
        created=st.booleans(),
        canceled=st.booleans(),
        compact_revision=INT64,
        cancel_reason=st.text(max_size=50),
        events=st.lists(EVENTS, max_size=5),
    )
)
def test_a_watch_response(response: messages.Message) -> None:
    found = messages.watch_response(response.SerializeToString())
    assert found.changes == tuple(
        Change(
            text(event.kv.key),
            event.kv.value if event.type == event.PUT else None,
            event.kv.mod_revision,
        )
        for event in response.events
    )
    assert (found.created, found.canceled) == (response.created, response.canceled)
    assert found.compact_revision == response.compact_revision
    assert found.cancel_reason == response.cancel_reason
    if found.changes:
        assert found.revision == response.events[-1].kv.mod_revision
    elif response.created or response.canceled or response.watch_id == -1:
        assert found.revision == 0
    else:
        assert found.revision == response.header.revision


def test_fields_of_a_newer_etcd_are_passed_over() -> None:
    fixed = b"\xa1\x06" + bytes(8) + b"\xa5\x06" + bytes(4)  # field 100, of 8 and of 4 bytes
    unknown = fixed + b"\xa2\x06\x03new" + b"\xa0\x06\xac\x02"
    assert list(fields(unknown)) == [(100, b"new"), (100, 300)]
    known = etcdrpc.RangeResponse(more=True).SerializeToString()
    assert messages.page(unknown + known).more


@given(st.binary(max_size=40))
@example(b"\x0a")
@example(b"\x0a\x05abc")
@example(b"\x08\x80")
@example(b"\x0b")
@example(b"\x09abc")
def test_garbage_is_refused_or_read(data: bytes) -> None:
    try:
        for number, value in fields(data):
            assert number >= 0
            assert isinstance(value, (int, bytes))
    except ValueError:
        pass


@pytest.mark.parametrize("data", [b"\x0a", b"\x0a\x05abc", b"\x08\x80", b"\x0b", b"\x09abc"])
def test_a_message_that_breaks_off(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a protobuf message"):
        list(fields(data))
