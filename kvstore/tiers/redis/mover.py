"""What one thread of a Redis tier does: it moves objects, many requests ahead of their answers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from kvstore._native import Xxh3Stream, xxh3_64
from kvstore.memory.bounce import memory_at
from kvstore.tiers.base import ObjectName
from kvstore.tiers.redis.format import (
    HEADER,
    PIECE,
    Header,
    decode,
    encode,
    key_of,
    slot_of,
    spans,
)  # fmt: skip
from kvstore.tiers.redis.link import Broken, Link, Refused, Reply, command
from kvstore.tiers.redis.options import Node
from kvstore.tiers.redis.servers import FAULTS, Server, Servers
from kvstore.tiers.remote import Task

ASKING: Final = command(b"ASKING")

_AHEAD: Final = 8 << 20
"""Bytes asked for, or sent, before the first answer is waited for."""
_ROUNDS: Final = 4
"""Attempts, where a server says that another one has it now."""
_LINES: Final = 16
"""Bytes of what stands between values."""
_FAILURES: Final = (OSError, Refused, Broken)


class Links(dict[Node, Link]):
    """The connections of one thread, made when they are needed."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers

    def to(self, server: Server) -> Link:
        """One that can be used.

        Raises:
            OSError, Refused: none can be made.
        """
        link = self.get(server.node)
        if link is not None and not link.idle:
            self.drop(server)
            link = None
        if link is None:
            link = self[server.node] = self._servers.link(server.node)
        return link

    def drop(self, server: Server) -> None:
        """Close the one to a server, if there is one."""
        link = self.pop(server.node, None)
        if link is not None:
            self._servers.end(link.wire)


@dataclass(slots=True, eq=False)
class Move:
    """A task on its way.

    `target` is the server that was named for it, which is `asking`: it has its slot only in part.
    `fresh`: what lies there under its name counts for nothing. `sent`: part of it may be there.
    `again`: it is to be tried once more; `retried`: that was so because a connection had ended.
    """

    task: Task
    slot: int
    key: bytes
    target: Server | None = None
    fresh: bool = False
    sent: bool = False
    again: bool = False
    retried: bool = False
    error: str | None = None
    sum: Xxh3Stream = field(default_factory=Xxh3Stream)
    checksum: int | None = None

    @property
    def failed(self) -> bool:
        """What is left of it need not be moved."""
        return self.again or self.error is not None


class Mover:
    """Runs batches of tasks of one kind; belongs to one thread.

    Args:
        servers: to move from and to.
        prefix: of keys.
        life: milliseconds that an object with such an end lives there, None: for ever.
        finish: told how a task ended.
        claim: told before an object is put; whether it was to be deleted.
        delete: has what is left of an object deleted.
        renew: has an object live as long as if it were put now.
    """

    def __init__(
        self,
        servers: Servers,
        prefix: bytes,
        life: Callable[[int], int | None],
        finish: Callable[[Task, str | None], None],
        claim: Callable[[ObjectName], bool],
        delete: Callable[[Sequence[ObjectName]], None],
        renew: Callable[[ObjectName, int], None],
    ) -> None:
        self._servers = servers
        self._prefix = prefix
        self._life = life
        self._finish = finish
        self._claim = claim
        self._delete = delete
        self._renew = renew
        self._links = Links(servers)
        self._head = bytearray(HEADER)

    def run(self, tasks: Sequence[Task]) -> None:
        """Move all, and tell of each."""
        moves = []
        for task in tasks:
            name = task.job.name
            moves.append(Move(task, slot_of(name), key_of(self._prefix, name)))
        for number in range(_ROUNDS):
            self._round(moves, last=number == _ROUNDS - 1)
            moves = [move for move in moves if move.again]
            if not moves:
                return

    def _round(self, moves: list[Move], *, last: bool) -> None:
        groups: dict[tuple[Server | None, bool], list[Move]] = {}
        for move in moves:
            move.again, move.error, move.sum = False, None, Xxh3Stream()
            asking = move.target is not None
            server = move.target or self._servers.of(move.slot)
            groups.setdefault((server, asking), []).append(move)
        for (server, asking), group in groups.items():
            self._move(server, group, asking=asking)
        for move in moves if last else ():
            if move.again:
                self._end(move, "io_error")

    def _move(self, server: Server | None, moves: list[Move], *, asking: bool) -> None:
        is_put = moves[0].task.is_put
        reason = "io_error" if server is None else server.barred(is_put=is_put)
        if server is not None and reason is None:
            started = time.monotonic()
            try:
                link = self._links.to(server)
                (self._put if is_put else self._get)(link, server, moves, asking=asking)
                self._servers.worked(server, started, put=is_put)
                return
            except _FAILURES as e:
                self._links.drop(server)
                if _ended(e) and not any(move.retried for move in moves):
                    # It may have closed a connection that was too old for it.
                    for move in moves:
                        move.again = move.retried = not move.task.over
                    return
                reason = self._servers.failed(server, e, moves[0].key, is_put=is_put)
        for move in moves:
            self._end(move, reason)

    def _end(self, move: Move, error: str | None) -> None:
        name = move.task.job.name
        if error is not None and not move.task.over and (move.fresh or move.sent):
            self._delete([name])  # It was to be gone, or is there in part.
        move.again = False
        self._finish(move.task, error)

    def _answered(self, move: Move, server: Server, error: Refused) -> None:
        """A server refuses one thing, and goes on.

        Raises:
            Refused: it will refuse others, too.
        """
        if error.word in FAULTS:
            raise error
        if error.word in ("MOVED", "ASK") and self._servers.redirect:
            target = self._servers.moved(move.slot, str(error), server)
            move.again, move.target = True, target if error.word == "ASK" else None
        elif error.word == "TRYAGAIN":
            move.again = True
        elif error.word == "WRONGTYPE":
            move.error = "absent"
        else:
            move.error = self._servers.failed(server, error, move.key)

    # --- To memory --------------------------------------------------------------------------------

    def _get(self, link: Link, server: Server, moves: list[Move], *, asking: bool) -> None:
        requests = [
            (move, piece, *span)
            for move in moves
            for piece, span in enumerate(spans(move.task.job.nbytes))
        ]
        waiting: deque[tuple[Move, int, int, int]] = deque()
        asked = ahead = 0
        while asked < len(requests) or waiting:
            words = []
            while asked < len(requests) and ahead < _AHEAD:
                move, piece, _, nbytes = request = requests[asked]
                asked += 1
                if not move.failed:
                    key = key_of(self._prefix, move.task.job.name, piece)
                    words.append(ASKING * asking + command(b"GET", key))
                    waiting.append(request)
                    ahead += nbytes
            if words:
                link.send([b"".join(words)])
            while waiting and (ahead > _AHEAD // 2 or asked == len(requests)):
                move, piece, at, nbytes = waiting.popleft()
                self._take(link, server, move, piece, at, nbytes, asking=asking)
                ahead -= nbytes
                more = asked < len(requests) and requests[asked][0] is move
                if (not waiting or waiting[0][0] is not move) and (move.failed or not more):
                    self._got(move)  # Nothing of it is under way any more.

    def _take(
        self, link: Link, server: Server, move: Move, piece: int, at: int, nbytes: int, *,
        asking: bool,
    ) -> None:  # fmt: skip
        """One piece, into its place."""
        job = move.task.job
        try:
            if asking:
                link.reply()
            size = link.value(HEADER + _LINES)
        except Refused as e:
            self._answered(move, server, e)
            return
        if size is None:
            move.error = move.error or "absent"
            return
        head = memoryview(self._head)[: min(size, HEADER)]
        link.read(head)
        header = decode(head, job.name)
        fits = header is not None and (header.piece, header.nbytes) == (piece, job.nbytes)
        if header is None or not fits or size != HEADER + nbytes:
            link.end(size - len(head))
            move.error = "corrupt"
            return
        if not piece:
            move.checksum = header.checksum
        link.read(memory_at(job.address + at, nbytes))
        link.end()
        if header.checksum != move.checksum or job.checksum not in (None, header.checksum):
            move.error = move.error or "corrupt"
        if move.error is None:
            move.sum.update(job.address + at, nbytes)

    def _got(self, move: Move) -> None:
        if move.error == "absent" and move.checksum is not None:
            self._delete([move.task.job.name])  # The server has given up a part of it.
        if not move.again:
            whole = move.error is not None or move.sum.digest() == move.checksum
            self._end(move, move.error if whole else "corrupt")

    # --- From memory ------------------------------------------------------------------------------

    def _put(self, link: Link, server: Server, moves: list[Move], *, asking: bool) -> None:
        there = self._look(link, server, moves, asking=asking)
        waiting: deque[tuple[Move, int, bool]] = deque()
        ahead = 0
        for move, found in zip(moves, there, strict=True):
            if move.again or not self._wanted(move, found):
                continue
            job = move.task.job
            life = self._life(job.expires)
            end = b"\r\n"
            if life is not None:
                life = max(1, life)
                end += b"$2\r\nPX\r\n$%d\r\n%d\r\n" % (len(str(life)), life)
            for piece, (at, nbytes) in reversed(list(enumerate(spans(job.nbytes)))):
                assert move.checksum is not None
                header = Header(piece, job.nbytes, move.checksum, job.created or int(time.time()))
                key = key_of(self._prefix, job.name, piece)
                start = b"*%d\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n%s" % (
                    3 if life is None else 5, len(key), key, HEADER + nbytes,
                    encode(job.name, header),
                )  # fmt: skip
                move.sent = job.nbytes > PIECE
                link.send([ASKING * asking + start, memory_at(job.address + at, nbytes), end])
                waiting.append((move, nbytes, not piece))
                ahead += nbytes
                while ahead > _AHEAD:
                    ahead -= self._stored(link, server, *waiting.popleft(), asking=asking)
        for one in waiting:
            self._stored(link, server, *one, asking=asking)

    def _look(
        self, link: Link, server: Server, moves: list[Move], *, asking: bool
    ) -> list[Header | None]:
        """What is there already: other nodes may have put it."""
        words = []
        for move in moves:
            move.fresh = self._claim(move.task.job.name) or move.fresh
            look = command(b"GETRANGE", move.key, b"0", b"%d" % (HEADER - 1))
            words.append(ASKING * asking + look)
        link.send([b"".join(words)])
        found: list[Header | None] = []
        for move in moves:
            data: Reply = None
            try:
                if asking:
                    link.reply()
                data = link.reply()
            except Refused as e:
                self._answered(move, server, e)
                if move.error == "absent":  # Something else, which is replaced.
                    move.error = None
            there = decode(data, move.task.job.name) if isinstance(data, bytes) else None
            found.append(None if move.fresh else there)
        return found

    def _wanted(self, move: Move, found: Header | None) -> bool:
        """Whether an object is to be sent; else it has ended."""
        job, error = move.task.job, move.error
        if move.checksum is None:
            move.checksum = xxh3_64(job.address, job.nbytes)
        if error is None and job.checksum not in (None, move.checksum):
            error = "corrupt"
        elif error is None and (found is None or found.nbytes != job.nbytes):
            return True
        elif error is None and found is not None:
            error = None if found.checksum == move.checksum else "exists"
        if error is None:
            job.checksum = move.checksum
            self._renew(job.name, job.expires)
        self._end(move, error)
        return False

    def _stored(
        self, link: Link, server: Server, move: Move, nbytes: int, last: bool, *, asking: bool
    ) -> int:
        """The answer to a piece, of so many bytes; `last`: of its object."""
        try:
            if asking:
                link.reply()
            if link.reply() != b"OK":
                raise Broken("a put was answered by something else")
        except Refused as e:
            self._answered(move, server, e)
        if last and not move.again:
            move.task.job.checksum = move.checksum
            self._end(move, move.error)
        return nbytes


def _ended(error: Exception) -> bool:
    """Whether a connection has just ended, and another one may do."""
    return isinstance(error, ConnectionError) and not isinstance(error, Broken)
