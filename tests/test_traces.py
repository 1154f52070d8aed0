"""Trace files: every format good and bad, and the exact replay of our own recordings."""

from __future__ import annotations

import gc
import gzip
import itertools
import json
import math
import os
import statistics
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sllm.protocol.errors import UsageError
from sllm.protocol.limits import name_problem
from sllm.workload import FORMATS, RecordedWriter, Request, TraceRow, WorkloadSpec, generate, open_trace, read_trace, write_recorded
from sllm.workload.traces.azure import parse_timestamp
from sllm.workload.traces.base import plain

ROOT = Path(__file__).resolve().parent.parent
AZURE_CONV = ROOT / ".." / "shared" / "traces" / "AzureLLMInferenceTrace_conv.csv"
MODELS = ["alpha", "beta", "gamma"]
WITHOUT_HEADER = {"bailian", "mooncake"}  # each line is a request, the first one too
JSON_LINES = {*WITHOUT_HEADER, "recorded"}

# One good file of each format and the rows (arrival, prompt, output, model) it holds. A new format without an entry fails a test below.
GOOD: dict[str, tuple[str, list[tuple[float, int, int, str | None]]]] = {
    "azure": (
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50.9951690,396,109\r\n"
        "2023-11-16 18:16:00.0000000,10,1\r\n2023-11-17 00:00:46.6805900,11,2\r\n",
        [(0.0, 374, 44, None), (4.314579, 396, 109, None), (13.31941, 10, 1, None), (20700.0, 11, 2, None)],
    ),
    "bailian": (
        "".join(
            json.dumps({"chat_id": i, "parent_chat_id": -1, "timestamp": t, "input_length": p, "output_length": o, "type": "text", "turn": 1, "hash_ids": [i]})
            + "\n"
            for i, (t, p, o) in enumerate([(61.114, 521, 132), (61.114, 20, 7), (61.2, 90, 3), (93.5, 12, 1)])
        ),
        [(0.0, 521, 132, None), (0.0, 20, 7, None), (0.086, 90, 3, None), (32.386, 12, 1, None)],
    ),
    "burstgpt": (
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,Conversation log\n"
        "45,ChatGPT,1087,230,1317,Conversation log\n118,GPT-4,417,276,693,API log\n",
        [(0.0, 472, 18, "ChatGPT"), (40.0, 1087, 230, "ChatGPT"), (113.0, 417, 276, "GPT-4")],
    ),
    "mooncake": (
        "".join(
            json.dumps({"timestamp": t, "input_length": p, "output_length": o, "hash_ids": [0, 1]}) + "\n"
            for t, p, o in [(27000, 6755, 500), (27000, 7319, 490), (27000, 100, 3), (30000, 7234, 794)]
        ),
        [(0.0, 6755, 500, None), (1.0, 7319, 490, None), (2.0, 100, 3, None), (3.0, 7234, 794, None)],
    ),
    "recorded": (
        '{"schema":"sllm-workload","version":1}\n'
        '{"arrival_s":0.25,"request_id":"r0","model":"beta","prompt_tokens":5,"output_tokens":6,"priority":2}\n'
        '{"arrival_s":1e1,"request_id":"x","model":"alpha","prompt_tokens":7,"output_tokens":8,"priority":0}\n',
        [(0.25, 5, 6, "beta"), (10.0, 7, 8, "alpha")],
    ),
    "splitwise-sim": (
        "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,token_size\n"
        "0,2,0,1.5,1,4096,32\n1,2,0,3,1,2048,8\n",
        [(0.0, 4096, 32, None), (1.5, 2048, 8, None)],
    ),
    "vidur": (
        "arrived_at,num_prefill_tokens,num_decode_tokens\n0.125,591,140\n2.5,547,248\n",
        [(0.0, 591, 140, None), (2.375, 547, 248, None)],
    ),
}


def put(folder: Path, content: str | bytes, name: str = "trace.dat") -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def failure(path: str) -> str:
    """The one line a user sees when the file at `path` is read to its end."""
    with pytest.raises(UsageError) as caught:
        list(read_trace(path))
    text = str(caught.value)
    assert "\n" not in text
    assert path in text
    return text.replace(path, "FILE")


def assert_rows(rows: list[TraceRow], wanted: Sequence[tuple[float, int, int, str | None]]) -> None:
    assert [(r.prompt_tokens, r.output_tokens, r.model) for r in rows] == [w[1:] for w in wanted]
    assert [r.arrival_s for r in rows] == pytest.approx([w[0] for w in wanted], abs=1e-9)


# --- every format ---------------------------------------------------------------------------------------------------------------------


def test_there_is_a_sample_of_every_format() -> None:
    assert set(GOOD) == set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_a_good_file_is_recognised_and_read(name: str, tmp_path: Path) -> None:
    text, wanted = GOOD[name]
    with open_trace(put(tmp_path, text)) as trace:
        assert trace.format_name == name
        assert_rows(list(trace), wanted)
        assert trace.skipped == 0


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("change", ["crlf", "no_last_newline", "blank_lines", "byte_order_mark", "gzip", "two_gzip_members"])
def test_ways_of_writing_the_same_file(name: str, change: str, tmp_path: Path) -> None:
    text, wanted = GOOD[name]
    text = text.replace("\r\n", "\n")
    raw = {
        "crlf": text.replace("\n", "\r\n").encode(),
        "no_last_newline": text.rstrip("\n").encode(),
        "blank_lines": ("\n" + text.replace("\n", "\n\n") + "  \n").encode(),
        "byte_order_mark": b"\xef\xbb\xbf" + text.encode(),
        "gzip": gzip.compress(text.encode()),
        "two_gzip_members": gzip.compress(text[:50].encode()) + gzip.compress(text[50:].encode()),
    }[change]
    assert_rows(list(read_trace(put(tmp_path, raw))), wanted)


@pytest.mark.parametrize("name", FORMATS)
def test_a_pipe_is_read_like_a_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    text, wanted = GOOD[name]
    writer = threading.Thread(target=path.write_text, args=(text,), daemon=True)
    writer.start()
    assert_rows(list(read_trace(str(path))), wanted)
    writer.join(10)


@pytest.mark.parametrize("name", FORMATS)
def test_truncated_gzip(name: str, tmp_path: Path) -> None:
    raw = gzip.compress(GOOD[name][0].encode())
    for missing in (1, 12, len(raw) // 2):
        assert "cut off" in failure(put(tmp_path, raw[:-missing]))


@pytest.mark.parametrize("name", FORMATS)
def test_not_utf8_names_the_place(name: str, tmp_path: Path) -> None:
    raw = GOOD[name][0].encode()
    second = raw.index(b"\n") + 1
    text = failure(put(tmp_path, raw[: second + 4] + b"\xff" + raw[second + 4 :]))
    assert text == "FILE, line 2, column 5: not UTF-8 (byte 0xff)"


def spoil(name: str, column: str, value: str, row: int = 1) -> str:
    """The good file of a format with one value (as JSON, or as CSV text) replaced in one row, from 0."""
    lines = GOOD[name][0].replace("\r\n", "\n").splitlines()
    if name in JSON_LINES:
        at = row + (name == "recorded")
        record = json.loads(lines[at])
        record[column] = "@@"
        lines[at] = json.dumps(record).replace('"@@"', value)
    else:
        fields = lines[row + 1].split(",")
        fields[lines[0].split(",").index(column)] = value
        lines[row + 1] = ",".join(fields)
    return "\n".join(lines) + "\n"


COLUMNS = {
    "azure": ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    "bailian": ("timestamp", "input_length", "output_length"),
    "burstgpt": ("Timestamp", "Request tokens", "Response tokens"),
    "mooncake": ("timestamp", "input_length", "output_length"),
    "recorded": ("arrival_s", "prompt_tokens", "output_tokens"),
    "splitwise-sim": ("arrival_timestamp", "prompt_size", "token_size"),
    "vidur": ("arrived_at", "num_prefill_tokens", "num_decode_tokens"),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("value", ["abc", "", "nan", "NaN", "Infinity", "-Infinity", "1e400", "12a", '"x"', "1e16", "-99999999999999999999"])
def test_a_bad_number_names_line_and_column(name: str, which: int, value: str, tmp_path: Path) -> None:
    text = failure(put(tmp_path, spoil(name, COLUMNS[name][which], value)))
    line = 2 if name in WITHOUT_HEADER else 3
    assert text.startswith(f"FILE, line {line}, column ")
    if not (name in JSON_LINES and "JSON" in text):  # what is no JSON at all has a position instead of a name
        assert text.startswith(f"FILE, line {line}, column {COLUMNS[name][which]}: ")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("value", ["-1", "-374.0", "0.5", "10000001", "1" * 5000])
def test_a_count_no_request_can_have(name: str, which: int, value: str, tmp_path: Path) -> None:
    text = failure(put(tmp_path, spoil(name, COLUMNS[name][which], value)))
    assert len(text) < 200
    assert f"line {2 if name in WITHOUT_HEADER else 3}, column " in text


@pytest.mark.parametrize("name", FORMATS)
def test_whole_numbers_may_be_written_with_a_point(name: str, tmp_path: Path) -> None:
    rows = list(read_trace(put(tmp_path, spoil(name, COLUMNS[name][1], "374.0"))))
    assert rows[1].prompt_tokens == 374
    assert type(rows[1].prompt_tokens) is int


@pytest.mark.parametrize("name", FORMATS)
def test_time_must_not_go_back(name: str, tmp_path: Path) -> None:
    text = failure(put(tmp_path, spoil(name, COLUMNS[name][0], "2023-11-16 18:15:46.6805899" if name == "azure" else "0.1")))
    assert text.startswith(f"FILE, line {2 if name in WITHOUT_HEADER else 3}, column {COLUMNS[name][0]}: ")
    assert "earlier" in text


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"recorded"}))
@pytest.mark.parametrize("which", [1, 2])
def test_a_request_that_did_no_work_is_skipped_and_counted(name: str, which: int, tmp_path: Path) -> None:
    with open_trace(put(tmp_path, spoil(name, COLUMNS[name][which], "0", row=0))) as trace:
        rows = list(trace)
        assert trace.skipped == 1
    assert len(rows) == len(GOOD[name][1]) - 1
    assert rows[0].arrival_s == 0.0


@pytest.mark.parametrize("name", sorted(set(FORMATS) - JSON_LINES))
def test_a_header_alone_is_no_trace(name: str, tmp_path: Path) -> None:
    assert "no requests" in failure(put(tmp_path, GOOD[name][0].splitlines()[0]))


@pytest.mark.parametrize("name", sorted(set(FORMATS) - JSON_LINES))
@pytest.mark.parametrize(("line", "column"), [("1,2", "3"), (",".join("1" * 12), None)])
def test_a_row_of_another_width(name: str, line: str, column: str | None, tmp_path: Path) -> None:
    text = failure(put(tmp_path, GOOD[name][0].replace("\r\n", "\n") + line + "\n"))
    assert "columns where the header has" in text
    assert column is None or f"column {column}" in text


@given(name=st.sampled_from(sorted(FORMATS)), data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_a_usage_error_or_reads_well(name: str, data: st.DataObject, tmp_path: Path) -> None:
    """A fuzzer: bytes put in, cut out or cut off. Nothing but UsageError may come out, and rows keep their rules."""
    raw = GOOD[name][0].encode()
    if data.draw(st.booleans()):
        raw = gzip.compress(raw, mtime=0)
    start = data.draw(st.integers(0, len(raw)))
    stop = data.draw(st.integers(start, min(len(raw), start + 20)))
    raw = raw[:start] + data.draw(st.binary(max_size=8) | st.text(',"{}[]0-.e\n', max_size=8).map(str.encode)) + raw[stop:]
    path = put(tmp_path, raw)
    said = path
    rows: list[TraceRow] = []
    try:
        rows = list(read_trace(path))
    except UsageError as error:
        said = str(error)
    assert path in said
    assert "\n" not in said
    assert all(0 <= earlier.arrival_s <= later.arrival_s < math.inf for earlier, later in itertools.pairwise(rows))
    assert all(row.prompt_tokens >= 1 and row.output_tokens >= 1 for row in rows)


# --- files that are no traces ---------------------------------------------------------------------------------------------------------


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    assert "No such file" in failure(str(tmp_path / "missing.csv"))
    assert "directory" in failure(str(tmp_path))
    assert "cannot be read" in failure("nul\0byte")


@pytest.mark.parametrize("content", [b"", b"\n \n", gzip.compress(b"")])
def test_an_empty_file(content: bytes, tmp_path: Path) -> None:
    assert failure(put(tmp_path, content)) == "FILE, line 1, column 1: empty, not even a header"


@pytest.mark.parametrize("content", ["a,b,c\n1,2,3\n", "0.0,591,140\n", '{"a": 1}\n', '{"schema": "other", "version": 1}\n', "x" * 5000])
def test_unknown_columns_list_the_known_formats(content: str, tmp_path: Path) -> None:
    text = failure(put(tmp_path, content))
    assert text.startswith("FILE, line 1, column 1: no known format")
    assert all(kind.about in text for kind in FORMATS.values())
    assert len(text) < 1300


@pytest.mark.parametrize("content", ["[" * 100_000, "{" + '"a":[' * 100_000, "{not json}\n", '{"a":' + "9" * 5000 + "}"])
def test_a_first_line_that_is_no_sane_json(content: str, tmp_path: Path) -> None:
    assert failure(put(tmp_path, content)).startswith("FILE, line 1, column ")


def test_a_line_without_end_is_not_read_into_memory(tmp_path: Path) -> None:
    assert "longer than" in failure(put(tmp_path, b"\0" * 3_000_000))


def test_damaged_gzip(tmp_path: Path) -> None:
    raw = bytearray(gzip.compress(GOOD["vidur"][0].encode() * 3))
    raw[25:35] = b"\xaa" * 10
    said = failure(put(tmp_path, bytes(raw)))
    assert "cannot be read" in said
    assert "line 0" not in said


@pytest.mark.filterwarnings("error::ResourceWarning", "error::pytest.PytestUnraisableExceptionWarning")
def test_no_file_is_left_open(tmp_path: Path) -> None:
    path = put(tmp_path, gzip.compress(GOOD["vidur"][0].encode()))
    open_trace(path)
    next(read_trace(path))
    failure(put(tmp_path, GOOD["vidur"][0] + "x,1,1\n", "bad.csv"))
    failure(put(tmp_path, "a,b\n", "unknown.csv"))
    gc.collect()


# --- one by one -----------------------------------------------------------------------------------------------------------------------


def test_columns_are_found_by_name_in_any_order(tmp_path: Path) -> None:
    text = "Log Type,Response tokens,Timestamp,Request tokens,Model,More\nAPI log,18,5.0,472,GPT-4,x\n"
    assert_rows(list(read_trace(put(tmp_path, text))), [(0.0, 472, 18, "GPT-4")])


def test_burstgpt_of_eight_columns(tmp_path: Path) -> None:
    text = (
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "19440110.0,1722ac82,43,GPT-4,906,446,1352,Conversation log\n19440161.0,,2,ChatGPT,36,0,36,API log\n19440192.5,,2,ChatGPT,36,29,65,API log\n"
    )
    with open_trace(put(tmp_path, text)) as trace:
        assert_rows(list(trace), [(0.0, 906, 446, "GPT-4"), (82.5, 36, 29, "ChatGPT")])
        assert (trace.format_name, trace.skipped) == ("burstgpt", 1)


def test_quoted_fields(tmp_path: Path) -> None:
    text = GOOD["burstgpt"][0].replace("ChatGPT", '"Chat,""GPT"""').replace("472", '"472"')
    rows = list(read_trace(put(tmp_path, text)))
    assert rows[0] == TraceRow(0.0, 472, 18, 'Chat,"GPT"')


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("2024-05-10 00:00:00.009930+00:00", (0, 0.00993)),
        ("2024-05-10T01:02:03Z", (62, 3.0)),
        ("2024-05-10 01:02:03.1234567-02:30", (212, 3.1234567)),
        ("2024-05-10 00:10:59.999999999", (10, 59.999999999)),
        ("2024-05-10T01:02:03z", (62, 3.0)),
        ("2024-05-10t01:02:03.5+0000", (62, 3.5)),
        ("2024-05-10T06:32:03.5+05:30", (62, 3.5)),
        ("2024-05-10T06:32:03.5+0530", (62, 3.5)),
        ("2024-05-10 02:02:03+01", (62, 3.0)),
        ("2024-05-10 01:02:03 +00:00", (62, 3.0)),
        ("2024-05-10 01:02:03.25 UTC", (62, 3.25)),
        ("2024-05-10 01:02:03,25-00", (62, 3.25)),
        ("20240510T010203Z", (62, 3.0)),
        (" 2024-05-10 01:02:03 ", (62, 3.0)),
    ],
)
def test_timestamps(text: str, wanted: tuple[int, float]) -> None:
    assert parse_timestamp(text)[1:] == wanted


@pytest.mark.parametrize(
    "text",
    ["2023-02-30 00:00:00", "2023-11-16 24:00:00", "2023-11-16 18:60:00", "2023-11-16 18:15:60", "2023-11-16", "2023-11-16 18:15:4e1", "18:15:46",
     "2023-11-16 18:15:46e12", "2023-11-16 18:15:-5.00", "2023-11-16 18:15:46.68+25:00",
     "2023-11-16 18:15", "2023-1116 18:15:46", "2023-11-16 18:1546", "2023-11-16 18:15:46+5", "2023-11-16 18:15:46 CET", "2023-11-16 18:15:46+00:60", "46"],
)  # fmt: skip
def test_bad_timestamps(text: str, tmp_path: Path) -> None:
    said = failure(put(tmp_path, spoil("azure", "TIMESTAMP", text)))
    assert said == f"FILE, line 3, column TIMESTAMP: {text!r} is not a date and time (YYYY-MM-DD hh:mm:ss.fffffff, with or without a time zone)"


def test_azure_with_time_zones_over_midnight(tmp_path: Path) -> None:
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 23:59:59.500000+00:00,1,2\n2024-05-11 00:00:00.250000+00:00,3,4\n"
    assert_rows(list(read_trace(put(tmp_path, text))), [(0.0, 1, 2, None), (0.75, 3, 4, None)])


def test_azure_of_every_form_in_one_file(tmp_path: Path) -> None:
    """Each row is read by its own form: what is kept from one row for the next is no zone and no origin of another."""
    times = [
        "2024-05-10 23:59:58.5", "2024-05-10T23:59:59.5+0000", "2024-05-10 23:59:59.7500000", "2024-05-11T00:00:00.5z", "2024-05-11T05:30:01.5+05:30",
        "2024-05-10 23:00:02.5-01", "2024-05-11 00:00:03.5", "20240511T000004.5Z", "2024-05-11 00:00:05.5 UTC",
    ]  # fmt: skip
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(f"{time},1,2\n" for time in times)
    assert [row.arrival_s for row in read_trace(put(tmp_path, text))] == [0.0, 1.0, 1.25, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]


# Spaces, tabs and quotes around what each format has.
PADDINGS = ["{} ", " {}", "\t{}\t", '"{}"', ' "{}"', '"{}" ', ' " {} " ']


@pytest.mark.parametrize("name", sorted(set(FORMATS) - JSON_LINES))
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_spaces_around_fields_are_no_part_of_them(name: str, padding: str, mark: str, tmp_path: Path) -> None:
    lines = [[*line.split(","), "more"] for line in GOOD[name][0].replace("\r\n", "\n").splitlines()]
    lines = [[*fields, "Model" if number == 0 and name != "burstgpt" else "GPT-4"] for number, fields in enumerate(lines)]
    text = mark + "\r\n".join(",".join(padding.format(field) for field in fields) for fields in lines)
    wanted = [(*row[:3], row[3] or "GPT-4") for row in GOOD[name][1]]
    assert_rows(list(read_trace(put(tmp_path, text))), wanted)


@pytest.mark.parametrize("name", sorted(set(FORMATS) - JSON_LINES))
@pytest.mark.parametrize("spelling", ["{}", " {}", '"{}"'])
@pytest.mark.parametrize("change", [str, str.upper, str.lower])
def test_a_repeated_column_is_refused(name: str, spelling: str, change: Callable[[str], str], tmp_path: Path) -> None:
    """Any column, found by name or not: which of the two holds the figures nobody can tell."""
    header, *rows = GOOD[name][0].replace("\r\n", "\n").splitlines()
    for position, column in enumerate(header.split(","), 1):
        again = change(column)
        text = "\n".join([f"{header},x,{spelling.format(again)}", *(f"{row},x,y" for row in rows)])
        last = len(header.split(",")) + 2
        assert failure(put(tmp_path, text)) == f"FILE, line 1, column {last}: {again!r} is the name of column {position} too: which of them counts?"


def test_columns_without_a_name_may_repeat(tmp_path: Path) -> None:
    text = ",arrived_at,num_prefill_tokens,num_decode_tokens,,\n0,0.5,10,20,,\n1,1.5,30,40,,\n"
    assert_rows(list(read_trace(put(tmp_path, text))), [(0.0, 10, 20, None), (1.0, 30, 40, None)])


@pytest.mark.parametrize("name", sorted(JSON_LINES))
def test_a_repeated_key_is_refused(name: str, tmp_path: Path) -> None:
    lines = GOOD[name][0].splitlines()
    for at in range(len(lines)):
        key = next(iter(json.loads(lines[at])))
        spoilt = [*lines[:at], lines[at][:-1] + f', "{key}": 1}}', *lines[at + 1 :]]
        assert failure(put(tmp_path, "\n".join(spoilt))) == f"FILE, line {at + 1}: the key {key!r} is there twice: which of them counts?"


def test_a_quote_without_its_other_half(tmp_path: Path) -> None:
    text = "arrived_at,num_prefill_tokens,num_decode_tokens\n0,1,2\n1,1,\"2\n"
    assert failure(put(tmp_path, text)) == "FILE, line 3, column 5: a quote that is not closed"


# --- units ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["chat_id", "Chat_ID", "CHAT_ID"])
def test_a_bailian_trace_is_known_whatever_the_case_of_its_mark(spelling: str, tmp_path: Path) -> None:
    with open_trace(put(tmp_path, GOOD["bailian"][0].replace("chat_id", spelling))) as trace:
        assert trace.format_name == "bailian"


@pytest.mark.parametrize(("first", "second"), [("", '"Chat_ID": 1, '), ('"chat_id": 1, ', "")])
def test_a_file_of_bailian_and_mooncake_requests_is_refused(first: str, second: str, tmp_path: Path) -> None:
    """Their times are in different units."""
    lines = [f'{{{mark}"timestamp": 3, "input_length": 10, "output_length": 5}}\n' for mark in (first, first, second)]
    with pytest.raises(UsageError, match=r"line 3, column chat_id: .*in seconds, of others in milliseconds"):
        list(read_trace(put(tmp_path, "".join(lines))))


def test_bailian_times_are_seconds_and_are_not_spread_over_buckets(tmp_path: Path) -> None:
    rows = list(read_trace(put(tmp_path, GOOD["bailian"][0])))
    assert [row.arrival_s for row in rows] == pytest.approx([0.0, 0.0, 0.086, 32.386], abs=1e-9)


@pytest.mark.parametrize(
    ("time", "said"), [("0.489", "0.489 is not a whole number of milliseconds"), ("1732600000", "1732600000 is a date in seconds since 1970")]
)
def test_seconds_where_mooncake_has_milliseconds(time: str, said: str, tmp_path: Path) -> None:
    """Without a chat_id nothing but the times themselves tells that they are seconds."""
    text = failure(put(tmp_path, f'{{"timestamp": {time}, "input_length": 1, "output_length": 1}}\n'))
    assert text.startswith(f"FILE, line 1, column timestamp: {said}")
    assert "multiply" in text


def test_milliseconds_since_1970_are_milliseconds(tmp_path: Path) -> None:
    lines = [f'{{"timestamp": {1_732_600_000_000 + offset}, "input_length": 1, "output_length": 1}}\n' for offset in (0, 1500)]
    assert [row.arrival_s for row in read_trace(put(tmp_path, "".join(lines)))] == [0.0, 1.5]


@pytest.mark.parametrize("name", ["bailian", "burstgpt", "splitwise-sim", "vidur"])
def test_milliseconds_since_1970_are_no_seconds(name: str, tmp_path: Path) -> None:
    text = failure(put(tmp_path, spoil(name, COLUMNS[name][0], "1732600000000")))
    assert "1732600000000" in text
    assert "milliseconds" in text


@pytest.mark.parametrize(("value", "said"), [(1e16, "10000000000000000"), (1e-05, "0.00001"), (2.5, "2.5"), (1e6, "1000000"), (math.inf, "inf")])
def test_numbers_in_errors_have_no_exponent(value: float, said: str) -> None:
    assert plain(value) == said


def test_mooncake_buckets_do_not_reach_into_the_next(tmp_path: Path) -> None:
    records = [(0, 1), (0, 2), (500, 3), (500, 4), (9000, 5), (9000, 6)]
    text = "".join(json.dumps({"timestamp": t, "input_length": p, "output_length": 1}) + "\n" for t, p in records)
    rows = list(read_trace(put(tmp_path, text)))
    assert [r.arrival_s for r in rows] == [0.0, 0.25, 0.5, 2.0, 9.0, 10.5]
    assert [r.prompt_tokens for r in rows] == [1, 2, 3, 4, 5, 6]


# --- recordings -----------------------------------------------------------------------------------------------------------------------

names = st.text(min_size=1, max_size=60).filter(lambda name: not name_problem(name))
requests_strategy = st.lists(
    st.tuples(st.floats(0, 1e11), names, names, st.integers(1, 10_000_000), st.integers(1, 10_000_000), st.integers(0, 2)),
    unique_by=lambda row: row[1],
    max_size=20,
).map(lambda rows: [Request(*row) for row in sorted(rows, key=lambda row: row[0])])


@given(requests=requests_strategy, name=st.sampled_from(["w.jsonl", "w.jsonl.gz"]))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_recording_is_replayed_to_the_last_bit(requests: list[Request], name: str, tmp_path: Path) -> None:
    path = str(tmp_path / name)
    assert write_recorded(path, requests) == len(requests)
    models = sorted({r.model for r in requests}) or ["m"]
    replayed = list(generate(WorkloadSpec(trace=path), models, 1))
    assert replayed == requests
    assert [r.arrival_s.hex() for r in replayed] == [r.arrival_s.hex() for r in requests]


def test_a_generated_workload_survives_its_recording(tmp_path: Path) -> None:
    requests = list(generate(WorkloadSpec(rate_per_s=20, duration_s=20, arrivals="gamma"), MODELS, 3))
    first, second = str(tmp_path / "a.jsonl.gz"), str(tmp_path / "b.jsonl.gz")
    write_recorded(first, requests)
    write_recorded(second, iter(requests))
    assert Path(first).read_bytes() == Path(second).read_bytes()
    assert list(generate(WorkloadSpec(trace=first), MODELS, 99)) == requests


def test_a_recorded_model_must_be_in_the_catalogue(tmp_path: Path) -> None:
    path = put(tmp_path, GOOD["recorded"][0])
    workload = generate(WorkloadSpec(trace=path), ["beta"], 1)
    assert next(workload) == Request(0.25, "r0", "beta", 5, 6, 2)
    with pytest.raises(UsageError) as caught:
        next(workload)
    assert str(caught.value) == f"{path}, line 3, column model: 'alpha' is not in the catalogue"


@pytest.mark.parametrize(
    ("column", "value"),
    [("request_id", '""'), ("request_id", "7"), ("request_id", '"a\\nb"'), ("request_id", '"\\ud800"'), ("request_id", '"r0"'), ("model", "null"),
     ("model", json.dumps("m" * 129)), ("priority", "3"), ("priority", "true"), ("priority", "1.0"), ("prompt_tokens", "0"), ("output_tokens", "true")],
)  # fmt: skip
def test_bad_fields_of_a_recording(column: str, value: str, tmp_path: Path) -> None:
    assert failure(put(tmp_path, spoil("recorded", column, value))).startswith(f"FILE, line 3, column {column}: ")


def test_a_missing_field_of_a_recording(tmp_path: Path) -> None:
    assert failure(put(tmp_path, GOOD["recorded"][0] + '{"arrival_s": 11}\n')) == "FILE, line 4, column prompt_tokens: missing"


@pytest.mark.parametrize("version", ["2", "true", '"1"', "null"])
def test_a_recording_of_another_version(version: str, tmp_path: Path) -> None:
    text = failure(put(tmp_path, GOOD["recorded"][0].replace('"version":1', f'"version":{version}')))
    assert text.startswith("FILE, line 1, column version: ")


@pytest.mark.parametrize(
    "ids", [["r0", "r0"], ["a", "a"], ["r1", "r1"], ["r2", "x", "r2"], ["r0", "r1", "r0"], ["r0", "x", "y", "x"], ["r3", "r1", "r2", "r3"]]
)
def test_an_id_names_one_request(ids: list[str], tmp_path: Path) -> None:
    path = str(tmp_path / "w.jsonl")
    write_recorded(path, [Request(float(i), name, "alpha", 1, 1) for i, name in enumerate(ids)])
    assert failure(path).startswith(f"FILE, line {len(ids) + 1}, column request_id: ")


@given(ids=st.lists(st.sampled_from(["r0", "r1", "r2", "r3", "r4", "r01", "x"]), max_size=6))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ids_are_refused_exactly_when_they_repeat(ids: list[str], tmp_path: Path) -> None:
    path = str(tmp_path / "w.jsonl")
    write_recorded(path, [Request(float(i), name, "alpha", 1, 1) for i, name in enumerate(ids)])
    if len(set(ids)) == len(ids):
        assert [row.request_id for row in read_trace(path)] == ids
    else:
        failure(path)


@pytest.mark.parametrize(
    "bad",
    [Request(0.5, "b", "m", 1, 1), Request(math.nan, "b", "m", 1, 1), Request(math.inf, "b", "m", 1, 1), Request(2.0, "", "m", 1, 1),
     Request(2.0, "b", "m\n", 1, 1), Request(2.0, "b", "m", 0, 1), Request(2.0, "b", "m", 1, 1, 5)],
)  # fmt: skip
def test_what_could_not_be_read_back_is_not_written(bad: Request, tmp_path: Path) -> None:
    with RecordedWriter(str(tmp_path / "w.jsonl")) as writer:
        writer.write(Request(1.0, "a", "m", 1, 1))
        with pytest.raises(ValueError, match=r"Request\("):
            writer.write(bad)
    assert len(list(read_trace(writer.path))) == 1


def test_a_recording_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        RecordedWriter(str(tmp_path / "missing" / "w.jsonl"))
    with pytest.raises(UsageError, match="cannot be written"):
        RecordedWriter(str(tmp_path))


# --- traces as workloads --------------------------------------------------------------------------------------------------------------


def test_duration_cuts_a_trace_and_closes_it(tmp_path: Path) -> None:
    workload = generate(WorkloadSpec(trace=put(tmp_path, GOOD["azure"][0]), duration_s=13.0), MODELS, 1)
    assert [r.prompt_tokens for r in workload] == [374, 396]
    assert workload.describe()["format"] == "azure"
    assert list(workload) == []


def test_a_missing_trace_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        generate(WorkloadSpec(trace=str(tmp_path / "no.csv")), MODELS, 1)


def test_the_real_azure_trace() -> None:
    if not AZURE_CONV.exists():
        pytest.skip("put AzureLLMInferenceTrace_conv.csv of github.com/Azure/AzurePublicDataset into ../shared/traces")
    with open_trace(str(AZURE_CONV)) as trace:
        rows = list(trace)
        assert (trace.format_name, trace.skipped) == ("azure", 0)
    assert len(rows) == 19_366
    assert rows[0].arrival_s == 0.0
    assert rows[-1].arrival_s == pytest.approx(3501.721937, abs=1e-6)
    gaps = [later.arrival_s - earlier.arrival_s for earlier, later in itertools.pairwise(rows)]
    assert statistics.pstdev(gaps) / statistics.fmean(gaps) == pytest.approx(1.094, abs=0.001)
    for values, mean, median, largest in (
        ([r.prompt_tokens for r in rows], 1154.7, 1020, 14050),
        ([r.output_tokens for r in rows], 211.1, 129, 1000),
    ):
        assert (round(statistics.fmean(values), 1), statistics.median(values), max(values)) == (mean, median, largest)
    requests = list(generate(WorkloadSpec(trace=str(AZURE_CONV)), MODELS, 1))
    assert [r[0] for r in requests] == [r.arrival_s for r in rows]
