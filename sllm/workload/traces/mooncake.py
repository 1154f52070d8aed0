"""Mooncake's traces (Qin et al., FAST 2025; github.com/kvcache-ai/Mooncake): one JSON object a line, time in milliseconds.

Times are rounded down to buckets of about 3 s (0, 3052, 6105, ...). Rounded times would make an artificial burst at the start of each bucket, so the
requests of a bucket are spread evenly, in their order, over 3 s or up to the next bucket, whichever is sooner. In a file where every request has its own
time nothing changes.

Times are whole milliseconds from the first request. Other tools write the same keys with seconds. A file in seconds would replay a thousand times too fast,
so it is refused; it is recognised by a fraction, or by a first time that is a date of this century in seconds since 1970.
"""

from __future__ import annotations

from collections.abc import Iterator

from sllm.workload.traces.bailian import MARK
from sllm.workload.traces.base import Header, JsonLinesFormat, Lines, TraceRow, plain

BUCKET_MS = 3000.0
DATES_S = (946_684_800, 4_102_444_800)  # 2000 to 2100, in seconds since 1970


class Mooncake(JsonLinesFormat):
    """The format. Keeps one bucket in memory."""

    name = "mooncake"
    about = 'JSON lines {"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [...]}'

    def matches(self, header: Header) -> bool:
        return super().matches(header) and header.find(MARK) is None

    def check_keys(self, lines: Lines, request: Header) -> None:
        if request.find(MARK) is not None:
            raise lines.error(MARK, "is there, and not in the first request of the file: times of such traces are in seconds, of others in milliseconds")

    def rows(self, lines: Lines, body: Iterator[str], header: Header) -> Iterator[TraceRow]:
        origin_ms: float | None = None
        bucket_ms = 0.0
        bucket: list[tuple[int, int, str | None]] = []
        for time_ms, prompt, output, model in self.records(lines, body, header):
            if time_ms != int(time_ms):
                raise self._in_seconds(lines, f"{plain(time_ms)} is not a whole number of milliseconds")
            if origin_ms is None:
                origin_ms = bucket_ms = time_ms
                if DATES_S[0] <= time_ms < DATES_S[1]:
                    raise self._in_seconds(lines, f"{plain(time_ms)} is a date in seconds since 1970")
            if time_ms > bucket_ms:
                yield from _spread(bucket, bucket_ms - origin_ms, min(BUCKET_MS, time_ms - bucket_ms))
                bucket, bucket_ms = [], time_ms
            bucket.append((prompt, output, model))
        yield from _spread(bucket, bucket_ms - (origin_ms or 0.0), BUCKET_MS)

    def _in_seconds(self, lines: Lines, problem: str) -> Exception:
        return lines.error(self.time_key, f"{problem}: Mooncake's times are milliseconds from the first request; multiply a file in seconds by 1000")


def _spread(bucket: list[tuple[int, int, str | None]], start_ms: float, width_ms: float) -> Iterator[TraceRow]:
    step_ms = width_ms / max(1, len(bucket))
    for index, (prompt, output, model) in enumerate(bucket):
        yield TraceRow((start_ms + index * step_ms) / 1000.0, prompt, output, model)


FORMAT = Mooncake()
