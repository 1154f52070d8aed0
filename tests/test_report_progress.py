import io
import re
from typing import Any

import pytest
from report_samples import recorded

from sllm.observe.recorder import Glance
from sllm.observe.report.progress import LINE_EVERY_S, REDRAW_EVERY_S, Progress, Snapshot

GLANCE = Glance(120, 100, 2, 1, 4, 0.212, 1.9)
STATES = {"READY": 4, "SUSPECT": 1, "DEAD": 0}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> Any:
        return self.now


class Terminal(io.StringIO):
    """A terminal that keeps its screen: as much of the control sequences as progress uses."""

    encoding = "utf-8"

    def __init__(self) -> None:
        super().__init__()
        self.screen = [""]
        self.row = self.column = 0
        self.cursor = True

    def isatty(self) -> Any:
        return True

    def write(self, text: str) -> Any:
        super().write(text)
        for token in re.findall(r"\x1b\[\??\d*[A-Za-z]|.|\n", text):
            self._do(token)
        return len(text)

    def _do(self, token: Any) -> None:
        if token == "\n":
            self.row, self.column = self.row + 1, 0
            while len(self.screen) <= self.row:
                self.screen.append("")
        elif token == "\r":
            self.column = 0
        elif token in ("\x1b[?25l", "\x1b[?25h"):
            self.cursor = token.endswith("h")
        elif token == "\x1b[J":
            self.screen = [*self.screen[: self.row], self.screen[self.row][: self.column]]
        elif token == "\x1b[K":
            self.screen[self.row] = self.screen[self.row][: self.column]
        elif re.fullmatch(r"\x1b\[\d+A", token):
            self.row -= int(token[2:-1])
            assert self.row >= 0
        elif token.startswith("\x1b"):
            assert token.endswith("m")
        else:
            line = self.screen[self.row].ljust(self.column)
            self.screen[self.row] = line[: self.column] + token + line[self.column + 1 :]
            self.column += 1


def snapshot(now_s: Any=12.0, total_s: Any=30.0, glance: Any=GLANCE, **more: Any) -> Any:
    return Snapshot(now_s, total_s, STATES, glance, **{"slots_used": 0.34, "kv_used": 0.95, "waiting": 7, **more})


def test_a_terminal_is_redrawn_in_place_a_few_times_a_second() -> None:
    stream, clock = Terminal(), Clock()
    drawn = 0
    with Progress(stream, clock, virtual=False) as progress:
        for _ in range(1000):
            clock.now += 0.01
            if progress.due():
                drawn += 1
                progress.update(snapshot(now_s=clock.now - 100.0))
                assert len(stream.screen) == 4
        assert drawn == pytest.approx(10.0 / REDRAW_EVERY_S, abs=2)
        assert re.search(r" 3[23] %  10 s of 30 s", stream.screen[0])
        assert "█" in stream.screen[0]
        assert "20 s left" in stream.screen[0]
        assert stream.screen[1].startswith("requests 100 done  17 in flight  3 failed or rejected")
        assert not stream.cursor
    assert stream.screen == [""]
    assert stream.cursor


def interrupted(progress: Any) -> None:
    with progress:
        progress.update(snapshot())
        assert not progress._stream.cursor
        raise KeyboardInterrupt


def test_ctrl_c_leaves_the_terminal_as_it_was() -> None:
    stream, clock = Terminal(), Clock()
    progress = Progress(stream, clock, virtual=False)
    with pytest.raises(KeyboardInterrupt):
        interrupted(progress)
    assert stream.screen == [""]
    assert stream.cursor
    progress.update(snapshot(), force=True)
    assert stream.screen == [""]


@pytest.mark.parametrize("columns", [20, 40, 79, 200])
def test_lines_never_fill_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sllm.observe.report.progress.columns_of", lambda stream, fallback: columns)
    stream = Terminal()
    Progress(stream, Clock(), virtual=True, no_color=True).update(snapshot(phase="draining", warning="the machine cannot keep up"))
    assert max(map(len, stream.screen)) < columns
    if columns == 200:
        assert "fleet    4 ready, 1 suspect  slots" in stream.screen[3]
        assert "TTFT     p50 212 ms, p99 1.90 s  4 cold starts" in stream.screen[2]
        assert "draining" in stream.screen[0]


def test_slots_and_kv_cache_are_bars_as_wide_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns, cells in ((40, 5), (80, 8), (120, 14), (200, 24)):
        monkeypatch.setattr("sllm.observe.report.progress.columns_of", lambda stream, fallback, columns=columns: columns)
        stream = Terminal()
        Progress(stream, Clock(), virtual=False, no_color=True).update(Snapshot(12.0, 30.0, {"READY": 4}, GLANCE, 0.5, 0.001, 7))
        if columns == 40:
            assert stream.screen[1:3] == ["requests 100 done  17 in flight", "         3 failed or rejected"]
            assert stream.screen[3:5] == ["TTFT     p50 212 ms, p99 1.90 s", "         4 cold starts"]
            assert stream.screen[6:] == ["         KV ░░░░░ 0 %  7 waiting"]
        fleet = next(line for line in stream.screen if line.startswith("fleet"))
        assert f"fleet    4 ready  slots {'█' * round(cells / 2)}{'░' * (cells - round(cells / 2))} 50 %" in fleet
        if columns > 40:
            assert f"KV {'░' * cells} 0 %  7 waiting" in fleet
        assert columns / 5 <= stream.screen[0].count("█") + stream.screen[0].count("░") <= columns / 3


def test_elsewhere_a_plain_line_now_and_then_and_at_the_end() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(stream, clock, virtual=False) as progress:
        for _ in range(120):
            clock.now += 0.1
            progress.update(snapshot(now_s=clock.now - 100.0, glance=GLANCE._replace(completed=round((clock.now - 100.0) * 10))))
        progress.update(snapshot(now_s=30.0), force=True)
    lines = stream.getvalue().splitlines()
    assert len(lines) == int(12 / LINE_EVERY_S) + 1
    assert "\x1b" not in stream.getvalue()
    assert lines[0].startswith("16 % · 5 s of 30 s")
    assert "10.0/s of 0/s offered" in lines[1]
    assert lines[-1].startswith("100 %")


def test_virtual_runs_show_wall_time_rates() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream, clock, virtual=True)
    progress.update(snapshot(now_s=0.0, glance=Glance(0, 0, 0, 0, 0, None, None)), force=True)
    clock.now += 2.0
    progress.update(snapshot(now_s=10.0, glance=Glance(30_100, 30_000, 0, 0, 0, 0.1, 0.2)), force=True)
    last = stream.getvalue().splitlines()[-1]
    assert "3,000/s of 3,010/s offered · 15,000/s of wall time" in last
    assert "10 s of 30 s simulated" in last
    assert "4 s left" in last


def test_live_rates_are_of_the_runs_clock() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream, clock, virtual=False)
    for wall, run, done in ((0.0, 0.0, 0), (1.0, 60.0, 600)):
        clock.now = 100.0 + wall
        progress.update(Snapshot(run, 600.0, {}, Glance(done, done, 0, 0, 0, None, None)), force=True)
    assert "10.0/s of 10.0/s offered" in stream.getvalue()
    assert "9 s left" in stream.getvalue()


def test_the_time_left_does_not_count_the_start() -> None:
    """Two seconds until the fleet is up, in which the run's clock stands still, say nothing of how fast it goes afterwards."""
    stream, clock = Terminal(), Clock()
    progress = Progress(stream, clock, virtual=False)
    for tenth in range(61):
        clock.now = 100.0 + tenth / 10
        now_s = max(0.0, tenth / 10 - 2.0)
        progress.update(snapshot(now_s=now_s, total_s=12.0, phase="" if now_s else "starting"))
    assert "4 s of 12 s  8 s left" in stream.screen[0]


def test_quiet_says_nothing_but_notes() -> None:
    stream, clock = Terminal(), Clock()
    with Progress(stream, clock, virtual=False, quiet=True) as progress:
        clock.now += 60.0
        assert not progress.due()
        progress.update(snapshot(), force=True)
        progress.note("warning: something")
    assert stream.getvalue() == "warning: something\n"


def test_a_note_stands_above_the_progress() -> None:
    stream, clock = Terminal(), Clock()
    with Progress(stream, clock, virtual=False) as progress:
        progress.update(snapshot())
        progress.note("worker-3 is DEAD")
        assert stream.screen[0] == "worker-3 is DEAD"
        assert len(stream.screen) == 5
    assert stream.screen == ["worker-3 is DEAD", ""]
    assert stream.cursor


def test_a_dumb_or_ascii_terminal_gets_what_it_can_show() -> None:
    stream = Terminal()
    Progress(stream, Clock(), virtual=False, dumb=True).update(snapshot(), force=True)
    assert "\x1b" not in stream.getvalue()
    raw = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    Progress(raw, Clock(), virtual=False).update(snapshot(), force=True)
    assert b" - " in raw.buffer.getvalue()


def test_a_stream_that_is_gone_does_not_stop_the_run() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with Progress(Gone(), Clock(), virtual=False) as progress:
        progress.update(snapshot(), force=True)
        progress.update(snapshot(), force=True)


def test_what_is_not_known_is_left_out() -> None:
    stream = io.StringIO()
    Progress(stream, Clock(), virtual=True).update(Snapshot(70.0, 0.0, {}, Glance(5, 0, 0, 0, 0, None, None)), force=True)
    assert stream.getvalue() == "70 s simulated · 0 done · 5 in flight · 0 cold starts\n"
    Progress(stream, Clock(), virtual=True).update(Snapshot(70.0, 0.0, {}, recorded(100, trouble=False).glance(), total_requests=400), force=True)
    assert "25 %" in stream.getvalue()
