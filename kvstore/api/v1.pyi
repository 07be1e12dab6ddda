import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import Any as _Any, ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Namespace(_message.Message):
    __slots__ = ("id", "model", "revision", "dtype", "adapter", "extra", "tenant", "block_tokens")
    class ExtraEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    EXTRA_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    id: str
    model: str
    revision: str
    dtype: str
    adapter: str
    extra: _containers.ScalarMap[str, str]
    tenant: str
    block_tokens: int
    def __init__(self, id: _Optional[str] = ..., model: _Optional[str] = ..., revision: _Optional[str] = ..., dtype: _Optional[str] = ..., adapter: _Optional[str] = ..., extra: _Optional[_Mapping[str, str]] = ..., tenant: _Optional[str] = ..., block_tokens: _Optional[int] = ...) -> None: ...

class Prefix(_message.Message):
    __slots__ = ("namespace_id", "namespace", "tokens", "keys")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    namespace_id: str
    namespace: Namespace
    tokens: Tokens
    keys: Keys
    def __init__(self, namespace_id: _Optional[str] = ..., namespace: _Optional[_Union[Namespace, _Mapping[str, _Any]]] = ..., tokens: _Optional[_Union[Tokens, _Mapping[str, _Any]]] = ..., keys: _Optional[_Union[Keys, _Mapping[str, _Any]]] = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("ids", "extras", "salt", "adapter", "media")
    IDS_FIELD_NUMBER: _ClassVar[int]
    EXTRAS_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    MEDIA_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    extras: _containers.RepeatedCompositeFieldContainer[BlockExtras]
    salt: str
    adapter: str
    media: _containers.RepeatedCompositeFieldContainer[Media]
    def __init__(self, ids: _Optional[_Iterable[int]] = ..., extras: _Optional[_Iterable[_Union[BlockExtras, _Mapping[str, _Any]]]] = ..., salt: _Optional[str] = ..., adapter: _Optional[str] = ..., media: _Optional[_Iterable[_Union[Media, _Mapping[str, _Any]]]] = ...) -> None: ...

class Media(_message.Message):
    __slots__ = ("modality", "digest", "offset", "length")
    MODALITY_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    modality: str
    digest: str
    offset: int
    length: int
    def __init__(self, modality: _Optional[str] = ..., digest: _Optional[str] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class BlockExtras(_message.Message):
    __slots__ = ("block", "values")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    block: int
    values: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, block: _Optional[int] = ..., values: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Keys(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Selection(_message.Message):
    __slots__ = ("namespace_id", "tenant", "prefix", "tier", "older_than", "unused_for", "everything")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    OLDER_THAN_FIELD_NUMBER: _ClassVar[int]
    UNUSED_FOR_FIELD_NUMBER: _ClassVar[int]
    EVERYTHING_FIELD_NUMBER: _ClassVar[int]
    namespace_id: str
    tenant: str
    prefix: Prefix
    tier: str
    older_than: _duration_pb2.Duration
    unused_for: _duration_pb2.Duration
    everything: bool
    def __init__(self, namespace_id: _Optional[str] = ..., tenant: _Optional[str] = ..., prefix: _Optional[_Union[Prefix, _Mapping[str, _Any]]] = ..., tier: _Optional[str] = ..., older_than: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping[str, _Any]]] = ..., unused_for: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping[str, _Any]]] = ..., everything: bool = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("prefix", "pieces")
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    PIECES_FIELD_NUMBER: _ClassVar[int]
    prefix: Prefix
    pieces: _containers.RepeatedCompositeFieldContainer[Piece]
    def __init__(self, prefix: _Optional[_Union[Prefix, _Mapping[str, _Any]]] = ..., pieces: _Optional[_Iterable[_Union[Piece, _Mapping[str, _Any]]]] = ...) -> None: ...

class Piece(_message.Message):
    __slots__ = ("start", "end")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    start: int
    end: int
    def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class LookupResponse(_message.Message):
    __slots__ = ("blocks", "tokens", "asked_blocks", "runs", "reason", "estimate", "namespace_id", "order", "order_tokens", "pieces", "piece_tokens")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ASKED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ESTIMATE_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    ORDER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PIECES_FIELD_NUMBER: _ClassVar[int]
    PIECE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    tokens: int
    asked_blocks: int
    runs: _containers.RepeatedCompositeFieldContainer[Run]
    reason: str
    estimate: _duration_pb2.Duration
    namespace_id: str
    order: _containers.RepeatedScalarFieldContainer[int]
    order_tokens: int
    pieces: _containers.RepeatedCompositeFieldContainer[StoredPiece]
    piece_tokens: int
    def __init__(self, blocks: _Optional[int] = ..., tokens: _Optional[int] = ..., asked_blocks: _Optional[int] = ..., runs: _Optional[_Iterable[_Union[Run, _Mapping[str, _Any]]]] = ..., reason: _Optional[str] = ..., estimate: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping[str, _Any]]] = ..., namespace_id: _Optional[str] = ..., order: _Optional[_Iterable[int]] = ..., order_tokens: _Optional[int] = ..., pieces: _Optional[_Iterable[_Union[StoredPiece, _Mapping[str, _Any]]]] = ..., piece_tokens: _Optional[int] = ...) -> None: ...

class StoredPiece(_message.Message):
    __slots__ = ("namespace_id", "blocks", "asked_blocks", "tier", "reason", "detail")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ASKED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    namespace_id: str
    blocks: int
    asked_blocks: int
    tier: str
    reason: str
    detail: str
    def __init__(self, namespace_id: _Optional[str] = ..., blocks: _Optional[int] = ..., asked_blocks: _Optional[int] = ..., tier: _Optional[str] = ..., reason: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class Run(_message.Message):
    __slots__ = ("first", "blocks", "tier", "node")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    first: int
    blocks: int
    tier: str
    node: str
    def __init__(self, first: _Optional[int] = ..., blocks: _Optional[int] = ..., tier: _Optional[str] = ..., node: _Optional[str] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("prefix",)
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    prefix: Prefix
    def __init__(self, prefix: _Optional[_Union[Prefix, _Mapping[str, _Any]]] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("namespace_id", "hit_blocks", "summary", "blocks")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    HIT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    namespace_id: str
    hit_blocks: int
    summary: str
    blocks: _containers.RepeatedCompositeFieldContainer[BlockReason]
    def __init__(self, namespace_id: _Optional[str] = ..., hit_blocks: _Optional[int] = ..., summary: _Optional[str] = ..., blocks: _Optional[_Iterable[_Union[BlockReason, _Mapping[str, _Any]]]] = ...) -> None: ...

class BlockReason(_message.Message):
    __slots__ = ("block", "key", "usable", "tier", "reason", "detail", "at")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    USABLE_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    block: int
    key: bytes
    usable: bool
    tier: str
    reason: str
    detail: str
    at: _timestamp_pb2.Timestamp
    def __init__(self, block: _Optional[int] = ..., key: _Optional[bytes] = ..., usable: bool = ..., tier: _Optional[str] = ..., reason: _Optional[str] = ..., detail: _Optional[str] = ..., at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping[str, _Any]]] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsResponse(_message.Message):
    __slots__ = ("node", "version", "uptime", "objects", "unwritten_objects", "leases", "sessions", "tiers", "counters", "draining")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NODE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    UPTIME_FIELD_NUMBER: _ClassVar[int]
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    UNWRITTEN_OBJECTS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    node: str
    version: str
    uptime: _duration_pb2.Duration
    objects: int
    unwritten_objects: int
    leases: int
    sessions: int
    tiers: _containers.RepeatedCompositeFieldContainer[TierStats]
    counters: _containers.ScalarMap[str, int]
    draining: bool
    def __init__(self, node: _Optional[str] = ..., version: _Optional[str] = ..., uptime: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping[str, _Any]]] = ..., objects: _Optional[int] = ..., unwritten_objects: _Optional[int] = ..., leases: _Optional[int] = ..., sessions: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[TierStats, _Mapping[str, _Any]]]] = ..., counters: _Optional[_Mapping[str, int]] = ..., draining: bool = ...) -> None: ...

class TierStats(_message.Message):
    __slots__ = ("name", "capacity_bytes", "used_bytes", "free_bytes", "fragmented_bytes", "pinned_bytes", "problem", "write_limit_bytes", "read_limit_bytes", "read_bytes_per_second")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    FRAGMENTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PINNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    WRITE_LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    READ_LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    name: str
    capacity_bytes: int
    used_bytes: int
    free_bytes: int
    fragmented_bytes: int
    pinned_bytes: int
    problem: str
    write_limit_bytes: int
    read_limit_bytes: int
    read_bytes_per_second: float
    def __init__(self, name: _Optional[str] = ..., capacity_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., free_bytes: _Optional[int] = ..., fragmented_bytes: _Optional[int] = ..., pinned_bytes: _Optional[int] = ..., problem: _Optional[str] = ..., write_limit_bytes: _Optional[int] = ..., read_limit_bytes: _Optional[int] = ..., read_bytes_per_second: _Optional[float] = ...) -> None: ...

class ListNamespacesRequest(_message.Message):
    __slots__ = ("tenant",)
    TENANT_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    def __init__(self, tenant: _Optional[str] = ...) -> None: ...

class ListNamespacesResponse(_message.Message):
    __slots__ = ("namespaces",)
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    namespaces: _containers.RepeatedCompositeFieldContainer[NamespaceInfo]
    def __init__(self, namespaces: _Optional[_Iterable[_Union[NamespaceInfo, _Mapping[str, _Any]]]] = ...) -> None: ...

class NamespaceInfo(_message.Message):
    __slots__ = ("namespace", "objects", "blocks", "bytes", "sessions", "last_used", "parts")
    class BytesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    LAST_USED_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    namespace: Namespace
    objects: int
    blocks: int
    bytes: _containers.ScalarMap[str, int]
    sessions: int
    last_used: _timestamp_pb2.Timestamp
    parts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, namespace: _Optional[_Union[Namespace, _Mapping[str, _Any]]] = ..., objects: _Optional[int] = ..., blocks: _Optional[int] = ..., bytes: _Optional[_Mapping[str, int]] = ..., sessions: _Optional[int] = ..., last_used: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping[str, _Any]]] = ..., parts: _Optional[_Iterable[str]] = ...) -> None: ...

class ListSessionsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListSessionsResponse(_message.Message):
    __slots__ = ("sessions",)
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedCompositeFieldContainer[SessionInfo]
    def __init__(self, sessions: _Optional[_Iterable[_Union[SessionInfo, _Mapping[str, _Any]]]] = ...) -> None: ...

class SessionInfo(_message.Message):
    __slots__ = ("id", "peer", "pid", "software", "token", "since", "namespace_ids", "leases", "requests")
    ID_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_IDS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    id: int
    peer: str
    pid: int
    software: str
    token: str
    since: _timestamp_pb2.Timestamp
    namespace_ids: _containers.RepeatedScalarFieldContainer[str]
    leases: int
    requests: int
    def __init__(self, id: _Optional[int] = ..., peer: _Optional[str] = ..., pid: _Optional[int] = ..., software: _Optional[str] = ..., token: _Optional[str] = ..., since: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping[str, _Any]]] = ..., namespace_ids: _Optional[_Iterable[str]] = ..., leases: _Optional[int] = ..., requests: _Optional[int] = ...) -> None: ...

class ListLeasesRequest(_message.Message):
    __slots__ = ("session", "owner")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    session: int
    owner: str
    def __init__(self, session: _Optional[int] = ..., owner: _Optional[str] = ...) -> None: ...

class ListLeasesResponse(_message.Message):
    __slots__ = ("leases",)
    LEASES_FIELD_NUMBER: _ClassVar[int]
    leases: _containers.RepeatedCompositeFieldContainer[LeaseInfo]
    def __init__(self, leases: _Optional[_Iterable[_Union[LeaseInfo, _Mapping[str, _Any]]]] = ...) -> None: ...

class LeaseInfo(_message.Message):
    __slots__ = ("id", "kind", "session", "owner", "blocks", "bytes", "since", "expires", "withdrawn")
    ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    WITHDRAWN_FIELD_NUMBER: _ClassVar[int]
    id: str
    kind: str
    session: int
    owner: str
    blocks: int
    bytes: int
    since: _timestamp_pb2.Timestamp
    expires: _timestamp_pb2.Timestamp
    withdrawn: bool
    def __init__(self, id: _Optional[str] = ..., kind: _Optional[str] = ..., session: _Optional[int] = ..., owner: _Optional[str] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., since: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping[str, _Any]]] = ..., expires: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping[str, _Any]]] = ..., withdrawn: bool = ...) -> None: ...

class WatchEventsRequest(_message.Message):
    __slots__ = ("namespace_id", "tenant", "after", "incarnation", "snapshot")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    namespace_id: str
    tenant: str
    after: int
    incarnation: str
    snapshot: bool
    def __init__(self, namespace_id: _Optional[str] = ..., tenant: _Optional[str] = ..., after: _Optional[int] = ..., incarnation: _Optional[str] = ..., snapshot: bool = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("sequence", "at", "stored", "removed", "cleared", "missed", "snapshot", "incarnation")
    class Stored(_message.Message):
        __slots__ = ("namespace_id", "block_hashes", "parent_block_hash", "token_ids", "block_size", "adapter", "medium", "tenant", "unordered")
        NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
        BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
        PARENT_BLOCK_HASH_FIELD_NUMBER: _ClassVar[int]
        TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
        BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
        ADAPTER_FIELD_NUMBER: _ClassVar[int]
        MEDIUM_FIELD_NUMBER: _ClassVar[int]
        TENANT_FIELD_NUMBER: _ClassVar[int]
        UNORDERED_FIELD_NUMBER: _ClassVar[int]
        namespace_id: str
        block_hashes: _containers.RepeatedScalarFieldContainer[bytes]
        parent_block_hash: bytes
        token_ids: _containers.RepeatedScalarFieldContainer[int]
        block_size: int
        adapter: str
        medium: str
        tenant: str
        unordered: bool
        def __init__(self, namespace_id: _Optional[str] = ..., block_hashes: _Optional[_Iterable[bytes]] = ..., parent_block_hash: _Optional[bytes] = ..., token_ids: _Optional[_Iterable[int]] = ..., block_size: _Optional[int] = ..., adapter: _Optional[str] = ..., medium: _Optional[str] = ..., tenant: _Optional[str] = ..., unordered: bool = ...) -> None: ...
    class Removed(_message.Message):
        __slots__ = ("namespace_id", "block_hashes", "medium", "reason", "tenant")
        NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
        BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
        MEDIUM_FIELD_NUMBER: _ClassVar[int]
        REASON_FIELD_NUMBER: _ClassVar[int]
        TENANT_FIELD_NUMBER: _ClassVar[int]
        namespace_id: str
        block_hashes: _containers.RepeatedScalarFieldContainer[bytes]
        medium: str
        reason: str
        tenant: str
        def __init__(self, namespace_id: _Optional[str] = ..., block_hashes: _Optional[_Iterable[bytes]] = ..., medium: _Optional[str] = ..., reason: _Optional[str] = ..., tenant: _Optional[str] = ...) -> None: ...
    class Cleared(_message.Message):
        __slots__ = ("namespace_id",)
        NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
        namespace_id: str
        def __init__(self, namespace_id: _Optional[str] = ...) -> None: ...
    class Missed(_message.Message):
        __slots__ = ("events",)
        EVENTS_FIELD_NUMBER: _ClassVar[int]
        events: int
        def __init__(self, events: _Optional[int] = ...) -> None: ...
    class Snapshot(_message.Message):
        __slots__ = ("complete",)
        COMPLETE_FIELD_NUMBER: _ClassVar[int]
        complete: bool
        def __init__(self, complete: bool = ...) -> None: ...
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    CLEARED_FIELD_NUMBER: _ClassVar[int]
    MISSED_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    at: _timestamp_pb2.Timestamp
    stored: Event.Stored
    removed: Event.Removed
    cleared: Event.Cleared
    missed: Event.Missed
    snapshot: Event.Snapshot
    incarnation: str
    def __init__(self, sequence: _Optional[int] = ..., at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping[str, _Any]]] = ..., stored: _Optional[_Union[Event.Stored, _Mapping[str, _Any]]] = ..., removed: _Optional[_Union[Event.Removed, _Mapping[str, _Any]]] = ..., cleared: _Optional[_Union[Event.Cleared, _Mapping[str, _Any]]] = ..., missed: _Optional[_Union[Event.Missed, _Mapping[str, _Any]]] = ..., snapshot: _Optional[_Union[Event.Snapshot, _Mapping[str, _Any]]] = ..., incarnation: _Optional[str] = ...) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("prefix", "ttl", "owner")
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    prefix: Prefix
    ttl: _duration_pb2.Duration
    owner: str
    def __init__(self, prefix: _Optional[_Union[Prefix, _Mapping[str, _Any]]] = ..., ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping[str, _Any]]] = ..., owner: _Optional[str] = ...) -> None: ...

class PinResponse(_message.Message):
    __slots__ = ("id", "blocks", "bytes", "reason", "expires")
    ID_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    id: str
    blocks: int
    bytes: int
    reason: str
    expires: _timestamp_pb2.Timestamp
    def __init__(self, id: _Optional[str] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., reason: _Optional[str] = ..., expires: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping[str, _Any]]] = ...) -> None: ...

class UnpinRequest(_message.Message):
    __slots__ = ("id", "owner")
    ID_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    id: str
    owner: str
    def __init__(self, id: _Optional[str] = ..., owner: _Optional[str] = ...) -> None: ...

class UnpinResponse(_message.Message):
    __slots__ = ("pins",)
    PINS_FIELD_NUMBER: _ClassVar[int]
    pins: int
    def __init__(self, pins: _Optional[int] = ...) -> None: ...

class SetTtlRequest(_message.Message):
    __slots__ = ("selection", "ttl")
    SELECTION_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    selection: Selection
    ttl: _duration_pb2.Duration
    def __init__(self, selection: _Optional[_Union[Selection, _Mapping[str, _Any]]] = ..., ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping[str, _Any]]] = ...) -> None: ...

class SetTtlResponse(_message.Message):
    __slots__ = ("objects",)
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    objects: int
    def __init__(self, objects: _Optional[int] = ...) -> None: ...

class PrefetchRequest(_message.Message):
    __slots__ = ("prefix", "tier")
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    prefix: Prefix
    tier: str
    def __init__(self, prefix: _Optional[_Union[Prefix, _Mapping[str, _Any]]] = ..., tier: _Optional[str] = ...) -> None: ...

class MoveRequest(_message.Message):
    __slots__ = ("selection", "to")
    SELECTION_FIELD_NUMBER: _ClassVar[int]
    TO_FIELD_NUMBER: _ClassVar[int]
    selection: Selection
    to: str
    def __init__(self, selection: _Optional[_Union[Selection, _Mapping[str, _Any]]] = ..., to: _Optional[str] = ...) -> None: ...

class CopyRequest(_message.Message):
    __slots__ = ("selection", "to")
    SELECTION_FIELD_NUMBER: _ClassVar[int]
    TO_FIELD_NUMBER: _ClassVar[int]
    selection: Selection
    to: str
    def __init__(self, selection: _Optional[_Union[Selection, _Mapping[str, _Any]]] = ..., to: _Optional[str] = ...) -> None: ...

class CompressRequest(_message.Message):
    __slots__ = ("selection", "codec")
    SELECTION_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    selection: Selection
    codec: str
    def __init__(self, selection: _Optional[_Union[Selection, _Mapping[str, _Any]]] = ..., codec: _Optional[str] = ...) -> None: ...

class DecompressRequest(_message.Message):
    __slots__ = ("selection",)
    SELECTION_FIELD_NUMBER: _ClassVar[int]
    selection: Selection
    def __init__(self, selection: _Optional[_Union[Selection, _Mapping[str, _Any]]] = ...) -> None: ...

class ClearRequest(_message.Message):
    __slots__ = ("selection", "dry_run")
    SELECTION_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    selection: Selection
    dry_run: bool
    def __init__(self, selection: _Optional[_Union[Selection, _Mapping[str, _Any]]] = ..., dry_run: bool = ...) -> None: ...

class Operation(_message.Message):
    __slots__ = ("id", "verb", "state", "total", "done", "changed", "bytes", "skipped", "message", "started", "finished", "dry_run", "requested_by")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[Operation.State]
        STATE_RUNNING: _ClassVar[Operation.State]
        STATE_DONE: _ClassVar[Operation.State]
        STATE_CANCELLED: _ClassVar[Operation.State]
        STATE_FAILED: _ClassVar[Operation.State]
    STATE_UNSPECIFIED: Operation.State
    STATE_RUNNING: Operation.State
    STATE_DONE: Operation.State
    STATE_CANCELLED: Operation.State
    STATE_FAILED: Operation.State
    class SkippedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    VERB_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    REQUESTED_BY_FIELD_NUMBER: _ClassVar[int]
    id: str
    verb: str
    state: Operation.State
    total: int
    done: int
    changed: int
    bytes: int
    skipped: _containers.ScalarMap[str, int]
    message: str
    started: _timestamp_pb2.Timestamp
    finished: _timestamp_pb2.Timestamp
    dry_run: bool
    requested_by: str
    def __init__(self, id: _Optional[str] = ..., verb: _Optional[str] = ..., state: _Optional[_Union[Operation.State, str]] = ..., total: _Optional[int] = ..., done: _Optional[int] = ..., changed: _Optional[int] = ..., bytes: _Optional[int] = ..., skipped: _Optional[_Mapping[str, int]] = ..., message: _Optional[str] = ..., started: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping[str, _Any]]] = ..., finished: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping[str, _Any]]] = ..., dry_run: bool = ..., requested_by: _Optional[str] = ...) -> None: ...

class CheckFinishRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class ListOperationsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListOperationsResponse(_message.Message):
    __slots__ = ("operations",)
    OPERATIONS_FIELD_NUMBER: _ClassVar[int]
    operations: _containers.RepeatedCompositeFieldContainer[Operation]
    def __init__(self, operations: _Optional[_Iterable[_Union[Operation, _Mapping[str, _Any]]]] = ...) -> None: ...

class SetQuotaRequest(_message.Message):
    __slots__ = ("tenant", "limits")
    class LimitsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    TENANT_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    limits: _containers.ScalarMap[str, int]
    def __init__(self, tenant: _Optional[str] = ..., limits: _Optional[_Mapping[str, int]] = ...) -> None: ...

class GetQuotaRequest(_message.Message):
    __slots__ = ("tenant",)
    TENANT_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    def __init__(self, tenant: _Optional[str] = ...) -> None: ...

class GetQuotaResponse(_message.Message):
    __slots__ = ("quotas",)
    QUOTAS_FIELD_NUMBER: _ClassVar[int]
    quotas: _containers.RepeatedCompositeFieldContainer[Quota]
    def __init__(self, quotas: _Optional[_Iterable[_Union[Quota, _Mapping[str, _Any]]]] = ...) -> None: ...

class Quota(_message.Message):
    __slots__ = ("tenant", "limits", "used", "pinned_bytes")
    class LimitsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class UsedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    TENANT_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    PINNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    limits: _containers.ScalarMap[str, int]
    used: _containers.ScalarMap[str, int]
    pinned_bytes: int
    def __init__(self, tenant: _Optional[str] = ..., limits: _Optional[_Mapping[str, int]] = ..., used: _Optional[_Mapping[str, int]] = ..., pinned_bytes: _Optional[int] = ...) -> None: ...

class GetAdmissionRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AdmissionPolicy(_message.Message):
    __slots__ = ("rules", "denied_tenants")
    class RulesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    RULES_FIELD_NUMBER: _ClassVar[int]
    DENIED_TENANTS_FIELD_NUMBER: _ClassVar[int]
    rules: _containers.ScalarMap[str, str]
    denied_tenants: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, rules: _Optional[_Mapping[str, str]] = ..., denied_tenants: _Optional[_Iterable[str]] = ...) -> None: ...

class SetAdmissionRequest(_message.Message):
    __slots__ = ("rules", "denied")
    class RulesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class DeniedTenants(_message.Message):
        __slots__ = ("tenants",)
        TENANTS_FIELD_NUMBER: _ClassVar[int]
        tenants: _containers.RepeatedScalarFieldContainer[str]
        def __init__(self, tenants: _Optional[_Iterable[str]] = ...) -> None: ...
    RULES_FIELD_NUMBER: _ClassVar[int]
    DENIED_FIELD_NUMBER: _ClassVar[int]
    rules: _containers.ScalarMap[str, str]
    denied: SetAdmissionRequest.DeniedTenants
    def __init__(self, rules: _Optional[_Mapping[str, str]] = ..., denied: _Optional[_Union[SetAdmissionRequest.DeniedTenants, _Mapping[str, _Any]]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("stop", "timeout")
    STOP_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    stop: bool
    timeout: _duration_pb2.Duration
    def __init__(self, stop: bool = ..., timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping[str, _Any]]] = ...) -> None: ...
