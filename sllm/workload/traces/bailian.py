"""Traces of Qwen in Alibaba Cloud's Bailian (github.com/alibaba-edu/qwen-bailian-usagetraces-anon): one JSON object a line, time in seconds.

Requests have the keys of Mooncake's traces and the further key `chat_id`, which distinguishes the two formats. Each request has its own time, to the
millisecond. Chats, turns and block hashes are not used.
"""

from __future__ import annotations

from collections.abc import Iterator

from sllm.workload.traces.base import OTHER_UNIT, TIME_MAX_S, Header, JsonLinesFormat, Lines, TraceRow, plain

MARK = "chat_id"


class Bailian(JsonLinesFormat):
    """The format."""

    name = "bailian"
    about = 'JSON lines {"chat_id": number, "timestamp": s, "input_length": tokens, "output_length": tokens, ...}'

    def matches(self, header: Header) -> bool:
        return super().matches(header) and header.find(MARK) is not None

    def check_keys(self, lines: Lines, request: Header) -> None:
        if request.find(MARK) is None:
            raise lines.error(MARK, "missing, and the first request of the file has it: times of such traces are in seconds, of others in milliseconds")

    def rows(self, lines: Lines, body: Iterator[str], header: Header) -> Iterator[TraceRow]:
        origin_s: float | None = None
        for time_s, prompt, output, model in self.records(lines, body, header):
            if not abs(time_s) < TIME_MAX_S:
                raise lines.error(self.time_key, f"{plain(time_s)} is not a time in seconds{OTHER_UNIT}")
            if origin_s is None:
                origin_s = time_s
            yield TraceRow(float(time_s - origin_s), prompt, output, model)


FORMAT = Bailian()
