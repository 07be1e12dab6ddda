"""A whole segment on its way to a medium."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvstore.tiers.base import InSegment, Job, JobDone, kept_sum
from kvstore.tiers.segments.format import Block, Segment, encode, nbytes_of, whole


class Changed(Exception):
    """Memory does not hold what its checksums say."""


@dataclass(slots=True, eq=False)
class Put:
    """The jobs of a segment; `made`: there is one more now."""

    name: InSegment
    jobs: Sequence[Job]
    done: JobDone
    sums: Sequence[int] = ()
    damaged: set[int] = field(default_factory=set)
    made: bool = False

    def seal(self, sums: Sequence[int]) -> bytes:
        """The header, given the XXH3 of the blocks as they are written; coded ones tell theirs.

        Raises:
            Changed: some of them are `damaged`.
        """
        sums = [kept_sum(job, found) for job, found in zip(self.jobs, sums, strict=True)]
        self.sums, now = sums, int(time.time())
        wrong = (job.checksum not in (None, sums[n]) for n, job in enumerate(self.jobs))
        self.damaged = {number for number, changed in enumerate(wrong) if changed}
        if self.damaged:
            raise Changed
        blocks = tuple(
            Block(job.name.key, checksum, job.created or now, job.expires)
            for job, checksum in zip(self.jobs, sums, strict=True)
        )
        digest, variant = self.name.namespace.digest, self.name.part.variant
        return encode(Segment(digest, variant, self.jobs[0].nbytes, blocks))


def segment_of(jobs: Sequence[Job]) -> InSegment | None:
    """The first one's name, if these are all blocks of a segment, in their order."""
    first = jobs[0].name
    if not isinstance(first, InSegment) or not whole(first.keys, first.namespace.block_tokens):
        return None
    nbytes = nbytes_of(first)
    same = all(job.nbytes == nbytes and job.name.namespace == first.namespace for job in jobs)
    return first if same and first.keys == tuple(job.name.key for job in jobs) else None
