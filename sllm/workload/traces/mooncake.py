"""Mooncake's traces (Qin et al., FAST 2025; github.com/kvcache-ai/Mooncake): one JSON object a line, time in milliseconds.

Times are rounded down to buckets of about 3 s (0, 3052, 6105, ...). Replayed as they stand they would make a burst at the start of each
bucket that never was, so the requests of a bucket are spread evenly over it, in their order: over 3 s, or up to the next bucket if that is
sooner. Where every request has a time of its own nothing changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from sllm.workload.traces.base import Header, Lines, TraceFormat, TraceRow, json_number, json_object, json_tokens, nothing

BUCKET_MS = 3000.0


class Mooncake(TraceFormat):
    """The format. Holds one bucket in memory."""

    name = "mooncake"
    about = 'JSON lines {"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [...]}'

    def matches(self, header: Header) -> bool:
        return header.record is not None and {"timestamp", "input_length", "output_length"}.issubset(header.columns)

    def rows(self, lines: Lines, body: Iterator[str], header: Header) -> Iterator[TraceRow]:
        origin_ms: float | None = None
        bucket_ms = 0.0
        bucket: list[tuple[int, int]] = []
        for text in chain((header.text,), body):
            if text.isspace():
                continue
            record = json_object(lines, text)
            time_ms = json_number(lines, record, "timestamp")
            prompt, output = json_tokens(lines, record, "input_length"), json_tokens(lines, record, "output_length")
            if not (prompt and output):
                lines.skipped += 1
                continue
            if origin_ms is None:
                origin_ms = bucket_ms = time_ms
            if time_ms < bucket_ms:
                raise lines.error("timestamp", f"{time_ms} is earlier than the request before it; sort the file by time")
            if time_ms > bucket_ms:
                yield from _spread(bucket, bucket_ms - origin_ms, min(BUCKET_MS, time_ms - bucket_ms))
                bucket, bucket_ms = [], time_ms
            bucket.append((prompt, output))
        if origin_ms is None:
            raise nothing(lines)
        yield from _spread(bucket, bucket_ms - origin_ms, BUCKET_MS)


def _spread(bucket: list[tuple[int, int]], start_ms: float, width_ms: float) -> Iterator[TraceRow]:
    step_ms = width_ms / max(1, len(bucket))
    for index, (prompt, output) in enumerate(bucket):
        yield TraceRow((start_ms + index * step_ms) / 1000.0, prompt, output)


FORMAT = Mooncake()
