"""What requests of the API mean: fields checked, namespaces found, prompts turned into keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeVar

from google.protobuf.duration_pb2 import Duration

from kvstore.api import v1
from kvstore.api.convert import namespace_of
from kvstore.blocks.keys import KEY_BYTES, Media, block_keys, prompt_extras
from kvstore.blocks.spec import Namespace
from kvstore.errors import SpecError
from kvstore.server.access.grants import Grant
from kvstore.server.control.errors import Refused, bad_field
from kvstore.server.control.operations import Operations
from kvstore.server.loop import Pace
from kvstore.server.node import Node
from kvstore.store.entry import Entry
from kvstore.store.pins import Pins
from kvstore.store.selection import Selection, candidates
from kvstore.transport.protocol import MAX_KEYS
from kvstore.values import lasting

T = TypeVar("T")

MAX_TOKENS: Final = 4 << 20
MAX_TTL: Final = 30 * 24 * 3600.0
_MAX_AGE: Final = 100 * 365 * 24 * 3600.0
_MAX_NAME: Final = 256
_MAX_MEDIA: Final = 1024
_MIN_ID: Final = 6
_ID_DIGITS: Final = 64
_HEX: Final = frozenset("0123456789abcdef")
_SLICE_TOKENS: Final = 8192
_SLICE_KEYS: Final = 4096


class Prompt(NamedTuple):
    """Blocks that a request names, from the start of a prompt."""

    namespace: Namespace
    keys: list[bytes]
    tokens: v1.Tokens | None
    """What it was given by; None: by keys."""


def seconds(message: Duration, field: str, *, high: float, low: float = 0.0) -> float:
    """A duration in seconds, more than `low` (or equal to it, if that is 0) and up to `high`.

    Raises:
        Refused: it lies outside.
    """
    value = message.seconds + message.nanos / 1e9
    if not low <= value <= high:
        raise bad_field(field, f"is {lasting(value)}; give {lasting(low)} to {lasting(high)}")
    return value


def ttl(message: Duration) -> float:
    """A time to live. Raises Refused: it is not positive, or too long."""
    return seconds(message, "ttl", low=0.001, high=MAX_TTL)


def name(value: str, field: str) -> str:
    """A name that must be given. Raises Refused: it is empty or too long."""
    if not value:
        raise bad_field(field, "is empty; give one")
    if len(value) > _MAX_NAME:
        raise bad_field(field, f"has {len(value)} characters; {_MAX_NAME} are allowed")
    return value


class Answers:
    """What one caller is answered: the base of the verbs. Made for each call, on the loop."""

    def __init__(self, node: Node, operations: Operations, pins: Pins, caller: Grant) -> None:
        self._node = node
        self._store = node.store
        self._operations = operations
        self._pins = pins
        self._caller = caller
        self._pace = Pace()

    def _tier(self, name: str, field: str, *, default: int | None = None) -> int:
        """The number of a tier. Raises Refused: it is not here, or not given."""
        if not name and default is not None:
            return default
        places = self._store.catalogue.places
        for number, place in places.items():
            if place.name == name:
                return number
        known = ", ".join(place.name for place in places.values())
        if name == "disk":
            text = f"this daemon has no tier 'disk', only {known}"
            raise Refused("NO_TIER", text, remedy="`kvstore serve --disk FOLDER` (disk.path)")
        raise bad_field(field, f"there is no tier {name[:80]!r}; this daemon has {known}")

    def _name(self, tier: int) -> str:
        """The name of a tier; of none, nothing."""
        place = self._store.catalogue.places.get(tier)
        return "" if place is None else place.name

    def _by_name(self, of_tiers: Mapping[int, int]) -> dict[str, int]:
        """What is known by number of each tier, by its name."""
        places = self._store.catalogue.places.items()
        return {place.name: of_tiers[n] for n, place in places if n in of_tiers}

    def _tenant(self, request: Any) -> str | None:
        """The tenant that a request or selection is about; None: any. Raises Denied."""
        if not request.HasField("tenant"):
            return None
        self._caller.check_tenant(request.tenant)
        tenant: str = request.tenant
        return tenant

    async def _namespaces(self) -> dict[bytes, Namespace]:
        """Those that hold blocks or are open in a session, as far as the caller sees them."""
        sees = self._caller.sees
        found: dict[bytes, Namespace] = {}
        async for usage in self._pace.over(list(self._store.usage.namespaces.values())):
            if sees(usage.namespace.tenant):
                found[usage.namespace.digest] = usage.namespace
        async for session in self._pace.over(list(self._node.sessions.values())):
            for namespace, _ in session.opened.values():
                if sees(namespace.tenant):
                    found.setdefault(namespace.digest, namespace)
        return found

    async def _namespace(self, text: str, field: str) -> Namespace:
        """The namespace whose id is, or begins with, `text`.

        Raises:
            Refused: none or several do, or `text` is no id.
        """
        wanted = text.lower()
        if not _MIN_ID <= len(wanted) <= _ID_DIGITS or not _HEX.issuperset(wanted):
            known = f"give {_MIN_ID} to {_ID_DIGITS} hex digits, as `kvstore namespaces` lists them"
            raise bad_field(field, f"{text[:80]!r} is no id; {known}")
        places = [await self._namespaces()]
        if self._caller.tenants is None:  # How long they are remembered depends on all tenants.
            places.append(self._store.usage.emptied)
        for place in places:
            if matches := [n for digest, n in place.items() if digest.hex().startswith(wanted)]:
                break
        else:
            raise Refused(
                "NAMESPACE_UNKNOWN",
                f"no namespace {wanted} here",
                remedy="ListNamespaces (`kvstore namespaces`) shows those there are; one that holds"
                " nothing here, or only in a tier that nodes share, is known once an engine opened"
                " it, or can be given by all of its fields (`namespace` in the API)",
            )
        if len(matches) > 1:
            many = f"{len(matches)} namespaces begin with {wanted}"
            raise bad_field(field, f"{many}; give more digits")
        return matches[0]

    async def _prompt(self, prefix: v1.Prefix, field: str = "prefix") -> Prompt:
        """The blocks that a request names.

        Raises:
            Refused: a field is missing or wrong, or there is no such namespace.
            AccessDenied: its tenant is out of reach.
        """
        match prefix.WhichOneof("in"):
            case "namespace_id":
                where = f"{field}.namespace_id"
                namespace = await self._namespace(prefix.namespace_id, where)
            case "namespace":
                try:
                    namespace = namespace_of(prefix.namespace)
                except SpecError as e:
                    raise bad_field(f"{field}.namespace", str(e)) from e
                self._caller.check_tenant(namespace.tenant)
            case _:
                raise bad_field(f"{field}.namespace_id", "is missing; give it, or namespace")
        match prefix.WhichOneof("of"):
            case "tokens":
                keys = await self._hashed(namespace, prefix.tokens, f"{field}.tokens")
                return Prompt(namespace, keys, prefix.tokens)
            case "keys":
                keys = await self._given(prefix.keys.keys, f"{field}.keys.keys")
                return Prompt(namespace, keys, None)
            case _:
                raise bad_field(f"{field}.tokens", "is missing; give it, or keys")

    async def _hashed(self, namespace: Namespace, tokens: v1.Tokens, field: str) -> list[bytes]:
        count, size = len(tokens.ids), namespace.block_tokens
        if count > MAX_TOKENS or count // size > MAX_KEYS:
            most = min(MAX_TOKENS, MAX_KEYS * size)
            raise bad_field(f"{field}.ids", f"has {count} tokens; send up to {most} in a call")
        given: dict[int, Sequence[bytes]] = {}
        async for extra in self._pace.over(tokens.extras):
            if extra.block in given:
                raise bad_field(
                    f"{field}.extras[{len(given)}].block", f"{extra.block} is given twice"
                )
            given[extra.block] = extra.values
        _check_media(tokens, field)
        keys: list[bytes] = []
        step = max(1, _SLICE_TOKENS // size)
        async for first in self._pace.over(range(0, count // size, step)):
            blocks = range(first, min(first + step, count // size))
            extras = engine_extras(tokens, size, blocks)
            for block in blocks:
                if block in given:
                    extras[block - first] = [*extras.get(block - first, ()), *given[block]]
            ids = tokens.ids[first * size : blocks.stop * size]
            keys += block_keys(namespace, ids, extras=extras, parent=keys[-1] if keys else None)
        return keys

    async def _given(self, keys: Sequence[bytes], field: str) -> list[bytes]:
        if len(keys) > MAX_KEYS:
            raise bad_field(field, f"has {len(keys)} keys; send up to {MAX_KEYS} in a call")
        taken: list[bytes] = []
        async for part in self._pace.over(slices(keys, _SLICE_KEYS)):
            for key in part:
                if len(key) != KEY_BYTES:
                    where = f"{field}[{len(taken)}]"
                    raise bad_field(where, f"has {len(key)} bytes; a key has {KEY_BYTES}")
                taken.append(key)
        return taken

    async def _selection(self, message: v1.Selection) -> Selection:
        """The stored blocks that a request chooses, never beyond what the caller sees.

        Raises:
            Refused: nothing is chosen, conditions contradict each other, or one makes no sense.
            AccessDenied: a tenant is out of reach.
        """
        conditions = [item.name for item, _ in message.ListFields() if item.name != "everything"]
        if message.everything and conditions:
            text = f"contradicts {', '.join(conditions)}; give one or the other"
            raise bad_field("selection.everything", text)
        if not message.everything and not conditions:
            raise bad_field("selection", "chooses nothing; give a condition, or everything")
        namespace: Namespace | None = None
        keys: list[bytes] | None = None
        if message.namespace_id:
            namespace = await self._namespace(message.namespace_id, "selection.namespace_id")
        if message.HasField("prefix"):
            asked = await self._prompt(message.prefix, "selection.prefix")
            if namespace is not None and namespace.digest != asked.namespace.digest:
                raise bad_field(
                    "selection.namespace_id", "is not the namespace of prefix; give one"
                )
            namespace, keys = asked.namespace, asked.keys
        ages = {
            name: seconds(getattr(message, name), f"selection.{name}", high=_MAX_AGE)
            for name in ("older_than", "unused_for")
            if message.HasField(name)
        }
        return Selection(
            namespace=namespace,
            tenant=self._tenant(message),
            tenants=self._caller.tenants,
            keys=keys,
            tier=None if not message.tier else self._tier(message.tier, "selection.tier"),
            **ages,
        )

    async def _chosen(self, selected: Selection) -> list[Entry]:
        """The stored objects that a selection means, those of a prompt last block first.

        So a prompt that is removed or moved in part keeps its beginning.
        """
        now = self._store.clock.monotonic()
        return [
            entry
            async for entry in self._pace.over(candidates(self._store, selected))
            if not entry.gone and selected.matches(entry, now)
        ]


def engine_extras(tokens: v1.Tokens, size: int, blocks: range) -> dict[int, list[bytes]]:
    """What an engine names `blocks` of `size` tokens by beside these, numbered from the first."""
    media = [Media(m.modality, m.digest, m.offset, m.length) for m in tokens.media]
    return prompt_extras(size, blocks, salt=tokens.salt, adapter=tokens.adapter, media=media)


def _check_media(tokens: v1.Tokens, field: str) -> None:
    if len(tokens.media) > _MAX_MEDIA:
        raise bad_field(f"{field}.media", f"are {len(tokens.media)}; {_MAX_MEDIA} are allowed")
    end = 0
    for number, item in enumerate(tokens.media):
        where = f"{field}.media[{number}]"
        name(item.modality, f"{where}.modality")
        name(item.digest, f"{where}.digest")
        if item.offset < end or not item.length:
            raise bad_field(f"{where}.offset", "give media in order, none inside another")
        end = item.offset + item.length


def slices(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """`items` in runs of `size`."""
    for first in range(0, len(items), size):
        yield items[first : first + size]
