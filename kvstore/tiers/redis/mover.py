"""What one thread of a Redis tier does: it moves objects, many requests ahead of their answers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from kvstore._native import Xxh3Stream, xxh3_64
from kvstore.memory.bounce import memory_at
from kvstore.tiers.redis.format import HEADER, PIECE, Header, decode, encode, key_of, slot_of, spans
from kvstore.tiers.redis.keeper import Keeper
from kvstore.tiers.redis.link import FAILURES, Broken, Link, Refused, Reply, command
from kvstore.tiers.redis.servers import Links, Server, Servers
from kvstore.tiers.remote import Crew
from kvstore.tiers.tasks import Task

_AHEAD: Final = 8 << 20
"""Bytes asked for, or sent, before the first answer is waited for."""
_TOGETHER: Final = 512 << 10
"""Bytes of small objects that are sent at once."""
_MOST_VIEWS: Final = 256
_ROUNDS: Final = 4
"""Attempts, where a server says that another one has it now."""
_LINES: Final = 16
"""Bytes of what stands between values."""
_LOOK: Final = b"%d" % (HEADER - 1)


@dataclass(slots=True, eq=False)
class Move:
    """A task on its way.

    `fresh`: what lies there under its name counts for nothing. `part`: there may be only a part of
    it. `again`: it is to be tried once more; `retried`: it was, as a connection had ended.
    """

    task: Task
    slot: int
    key: bytes
    fresh: bool = False
    part: bool = False
    again: bool = False
    retried: bool = False
    error: str | None = None
    sum: Xxh3Stream = field(default_factory=Xxh3Stream)
    checksum: int | None = None

    def add_up(self) -> None:
        """Compute the checksum of what is in memory, once; that of coded bytes is told."""
        job = self.task.job
        if self.checksum is None and job.name.part.coded:
            self.checksum = job.checksum
        if self.checksum is None:
            self.checksum = xxh3_64(job.address, job.nbytes)


class Mover:
    """Runs batches of tasks of one kind; belongs to one thread.

    Args:
        servers: to move from and to.
        keeper: knows what is to be deleted, and how long objects live.
        crew: told how tasks end.
    """

    def __init__(self, servers: Servers, keeper: Keeper, crew: Crew) -> None:
        self._servers = servers
        self._keeper = keeper
        self._prefix = keeper.prefix
        self._crew = crew
        self._links = Links(servers)
        self._head = memoryview(bytearray(HEADER))

    def run(self, tasks: Sequence[Task]) -> None:
        """Move all, and tell of each."""
        moves = []
        for task in tasks:
            name = task.job.name
            moves.append(Move(task, slot_of(name), key_of(self._prefix, name)))
        for _ in range(_ROUNDS):
            groups: dict[Server | None, list[Move]] = {}
            for move in moves:
                move.again, move.error, move.sum = False, None, Xxh3Stream()
                groups.setdefault(self._servers.of(move.slot), []).append(move)
            for server, group in groups.items():
                self._move(server, group)
            moves = [move for move in moves if move.again]
        for move in moves:
            self._end(move, "io_error")

    def _move(self, server: Server | None, moves: list[Move]) -> None:
        is_put = moves[0].task.is_put
        reason = "io_error" if server is None else server.barred(is_put=is_put)
        if server is not None and reason is None:
            started = time.monotonic()
            try:
                link = self._links.to(server)
                (self._put if is_put else self._get)(link, server, moves)
                self._servers.worked(server, started, put=is_put)
                return
            except FAILURES as e:
                if _ended(e) and not any(move.retried for move in moves):
                    # It may have closed a connection that was too old for it.
                    self._links.drop(server)
                    for move in moves:
                        move.again = move.retried = not move.task.over
                    return
                reason = self._links.fail(server, e, moves[0].key, is_put=is_put)
        for move in moves:
            self._end(move, reason)

    def _end(self, move: Move, error: str | None) -> None:
        name = move.task.job.name
        if error is not None and not move.task.over and (move.fresh or move.part):
            self._keeper.delete([name])  # It was to be gone, or is there in part.
        move.again = False
        self._crew.finish(move.task, error)

    def _refused(self, move: Move, server: Server, answer: Reply) -> bool:
        """Whether a server refuses one thing, but goes on.

        Raises:
            Refused: it will refuse others, too.
        """
        if not isinstance(answer, Refused):
            return False
        if self._servers.moved(move.slot, answer, server) or answer.word == "TRYAGAIN":
            move.again = True
        elif self._servers.is_fault(answer):
            raise answer
        elif answer.word == "ASK":  # Its slot is being moved, and this part of it has been.
            move.error = "away"
        elif answer.word == "WRONGTYPE":
            move.error = "absent"
        else:
            move.error = self._servers.failed(server, answer, move.key)
        return True

    # --- To memory --------------------------------------------------------------------------------

    def _get(self, link: Link, server: Server, moves: list[Move]) -> None:
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
                if move.error is None and not move.again:  # Else what is left of it is of no use.
                    words.append(command(b"GET", key_of(self._prefix, move.task.job.name, piece)))
                    waiting.append(request)
                    ahead += nbytes
            if words:
                link.send([b"".join(words)])
            while waiting and (ahead > _AHEAD // 2 or asked == len(requests)):
                move, piece, at, nbytes = waiting.popleft()
                self._take(link, server, move, piece, at, nbytes)
                ahead -= nbytes
                more = asked < len(requests) and requests[asked][0] is move
                failed = move.again or move.error is not None
                if (not waiting or waiting[0][0] is not move) and (failed or not more):
                    self._got(move)  # Nothing of it is under way any more.

    def _take(
        self, link: Link, server: Server, move: Move, piece: int, at: int, nbytes: int
    ) -> None:
        """One piece, into its place."""
        job, size = move.task.job, link.value(HEADER + _LINES)
        if not isinstance(size, int):
            if not self._refused(move, server, size):
                move.error = move.error or "absent"
            # The server has given up a part of it.
            move.part = move.part or (piece > 0 and move.error == "absent")
            return
        head = self._head[: min(size, HEADER)]
        link.read(head)
        header = decode(head, job.name)
        wanted = (piece, job.nbytes, HEADER + nbytes)
        if header is None or (header.piece, header.nbytes, size) != wanted:
            link.end(size - len(head))
            move.error = "corrupt"
            return
        if not piece:
            move.checksum = header.checksum
        link.read(memory_at(job.address + at, nbytes))
        link.end()
        if header.checksum != move.checksum:
            move.error = move.error or "corrupt"
        elif job.checksum not in (None, header.checksum):
            move.error = move.error or "absent"  # Another node has put other bytes since.
        if move.error is None:
            move.sum.update(job.address + at, nbytes)

    def _got(self, move: Move) -> None:
        if not move.again:
            coded = move.task.job.name.part.coded  # Who asks for it verifies it.
            whole = coded or move.error is not None or move.sum.digest() == move.checksum
            self._end(move, move.error if whole else "corrupt")

    # --- From memory ------------------------------------------------------------------------------

    def _put(self, link: Link, server: Server, moves: list[Move]) -> None:
        there = self._look(link, server, moves)
        waiting: deque[tuple[Move, int, bool]] = deque()
        views: list[bytes | memoryview] = []
        ahead = together = 0
        for move, found in zip(moves, there, strict=True):
            if move.again or not self._wanted(move, found):
                continue
            job, end, number = move.task.job, b"\r\n", 3
            life = self._keeper.life(job.expires)
            if life is not None:
                number, px = 5, b"%d" % max(1, life)
                end = b"\r\n$2\r\nPX\r\n$%d\r\n%s\r\n" % (len(px), px)
            move.part = job.nbytes > PIECE
            for piece, (at, nbytes) in reversed(list(enumerate(spans(job.nbytes)))):
                assert move.checksum is not None
                header = Header(piece, job.nbytes, move.checksum, job.created or int(time.time()))
                key = key_of(self._prefix, job.name, piece) if piece else move.key
                start = b"*%d\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n%s" % (
                    number, len(key), key, HEADER + nbytes, encode(job.name, header),
                )  # fmt: skip
                views += (start, memory_at(job.address + at, nbytes), end)
                waiting.append((move, nbytes, not piece))
                ahead += nbytes
                together += nbytes
                if together >= _TOGETHER or len(views) >= _MOST_VIEWS:
                    link.send(views)
                    views, together = [], 0
                while ahead > _AHEAD:
                    ahead -= self._stored(link, server, *waiting.popleft())
        link.send(views)
        for one in waiting:
            self._stored(link, server, *one)

    def _look(self, link: Link, server: Server, moves: list[Move]) -> list[Header | None]:
        """What is there already: other nodes may have put it."""
        for move in moves:
            move.fresh = self._keeper.claim(move.task.job.name) or move.fresh
        link.send([b"".join(command(b"GETRANGE", m.key, b"0", _LOOK) for m in moves)])
        moves[0].add_up()  # Meanwhile.
        found: list[Header | None] = []
        for move in moves:
            answer = link.reply()
            if self._refused(move, server, answer) and move.error == "absent":
                move.error = None  # Something else lies there, and is replaced.
            there = decode(answer, move.task.job.name) if isinstance(answer, bytes) else None
            found.append(None if move.fresh else there)
        return found

    def _wanted(self, move: Move, found: Header | None) -> bool:
        """Whether an object is to be sent; else it has ended."""
        job, error = move.task.job, move.error
        move.add_up()
        if error is None and job.checksum not in (None, move.checksum):
            error = "corrupt"
        elif error is None and (found is None or found.nbytes != job.nbytes):
            return True
        elif error is None and found is not None and found.checksum != move.checksum:
            error = "exists"
        if error is None:
            job.checksum = move.checksum
            self._keeper.renew(job.name, job.expires)
        self._end(move, error)
        return False

    def _stored(self, link: Link, server: Server, move: Move, nbytes: int, last: bool) -> int:
        """The answer to a piece, of so many bytes; `last`: of its object."""
        answer = link.reply()
        if not self._refused(move, server, answer) and answer != b"OK":
            raise Broken("a put was answered by something else")
        if last and not move.again:
            move.task.job.checksum = move.checksum
            self._end(move, move.error)
        return nbytes


def _ended(error: Exception) -> bool:
    """Whether a connection has just ended, and another one may do."""
    return isinstance(error, ConnectionError) and not isinstance(error, Broken)
