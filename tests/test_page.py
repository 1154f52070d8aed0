"""The fleet as it is shown: pictures, pages of them, and the page itself in a real browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from roles import tell

from config import Config
from coordinator import Coordinator
from entrypoint_coordinator import CoordinatorPart
from sllm.fleet.states import STATES
from sllm.fleet.table import Fleet
from sllm.live.http import BadQuery, HttpServer, Site
from sllm.observe import fleetview
from sllm.observe.fleetview import FleetPicture, History, Photographer, cells_of, natural, page_of, walk
from sllm.observe.page import fleet_page
from sllm.placement.registry import make_policy
from sllm.protocol.events import RequestRefused, RequestRouted
from sllm.protocol.messages import ACTIONS, COLD_START, DRAINING, READY, SATURATED, SERVE, STARTING, EngineSnapshot, Envelope, LoadReport
from sllm.protocol.seeds import rng_for
from sllm.run.assemble import build_catalog

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
HOSTILE = "<img src=x onerror=alert(1)>"


def report(names: tuple[str, ...], index: int, state: str = READY) -> LoadReport:
    running, waiting = index * 7 % 80, max(0, index * 7 % 80 - 64)
    engine = EngineSnapshot(
        64, running, waiting, waiting, 0.1 * (index % 13), 0.0, (index * 7 % 80) / 80, 1 << 30, 0.01, 1.0, 1 << 30,
        (names[index % len(names)], names[(index + 1) % len(names)]), (), ((names[(index + 2) % len(names)], 1.0),) if index % 9 == 0 else (),
        (names[(index + 3) % len(names)],), (), True,
    )  # fmt: skip
    return LoadReport(state, "", 8000, "h100-80g", 1000, engine, 0, 0, (), 1.0)


class Shown:
    """A real coordinator with a fleet that was heard of, and its part as the entry point makes it."""

    def __init__(self, workers: int) -> None:
        config = Config()
        self.node = Coordinator(config, build_catalog(config), make_policy(config.policy), rng_for(1, "test"), 1)
        names = self.node.catalog.names
        for i in range(workers):
            state = DRAINING if i % 211 == 210 else STARTING if i % 97 == 96 else READY
            self.node.receive(Envelope(f"worker-{i}", 1, 1, 0.0, report(names, i, state)), (f"10.0.{i // 250}.{i % 250}", 8000), 0.0)
        self.node.handle_timer(1.0)
        later: list[Any] = []
        service = SimpleNamespace(
            config=config, started_wall_s=0.0, clock=SimpleNamespace(now=1.5), host=SimpleNamespace(kernel_drops=0), stopping=False,
            driver=SimpleNamespace(call_at=lambda at, step: later.append(step)),
        )  # fmt: skip
        self.part = CoordinatorPart(service, self.node)  # type: ignore[arg-type]
        self._later = later
        for second in range(60 if workers else 0):
            for i in range(20 + second % 7):
                action = COLD_START if i % 11 == second % 5 else SERVE
                tell(self.part, RequestRouted(0.0, f"r{i}", names[i % 3], "worker-1", action, 0.05 + 0.01 * (i + second % 9), 1e-5))
            if second % 10 == 3:
                tell(self.part, RequestRefused(0.0, "r", "m", SATURATED))
            self.part.tick()

    def state(self, **query: str) -> dict[str, Any]:
        answers: list[Any] = []
        self.part.state(answers.append)
        while self._later:
            self._later.pop(0)()
        return {
            "role": "coordinator", "node_id": "coordinator", "version": "0", "uptime_s": 75.0, "ready": True, "reason": "ready",
            **self.part.page_state(answers[0], query),
        }  # fmt: skip

    def site(self) -> Site:
        return Site(lambda: (True, "ok"), lambda: (True, "ready"), lambda: "", lambda query: self.state(**query), fleet_page())


@pytest.fixture(scope="module")
def small() -> Shown:
    return Shown(5)


@pytest.fixture(scope="module")
def large() -> Shown:
    return Shown(5000)


def picture_of(shown: Shown) -> FleetPicture:
    *steps, picture = walk(shown.node.fleet, 1.5)
    assert set(steps) <= {None}
    assert picture is not None
    return picture


# --- pictures and pages ---------------------------------------------------------------------------------------------------------------


def test_a_picture_adds_up(large: Shown) -> None:
    picture = picture_of(large)
    rows = list(large.node.fleet)
    assert len(picture.workers) == len(rows) == 5000
    assert sum(picture.states.values()) == 5000
    assert picture.states == {state: n for state in STATES if (n := large.node.fleet.states[state])}
    assert picture.running == sum(row.engine.running for row in rows)
    assert picture.waiting == sum(row.engine.waiting for row in rows)
    for name, gpu, _, _ in picture.models:
        assert gpu == sum(name in row.engine.gpu_models for row in rows)


def test_a_walk_takes_small_steps(large: Shown) -> None:
    assert len(list(walk(large.node.fleet, 1.5))) == -(-5000 // fleetview.STEP_ROWS) + 1


def test_a_step_of_a_walk_is_bounded_by_the_names_of_its_rows_too(small: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleetview, "STEP_NAMES", 1)
    assert all(row.engine.gpu_models for row in small.node.fleet)
    assert len(list(walk(small.node.fleet, 1.5))) == 5 + 1


def test_an_empty_fleet_has_a_picture() -> None:
    (picture,) = walk([], 0.0)
    assert picture == FleetPicture(0.0, (), {}, 0, 0, 0, 0, 0.0, ())
    assert Shown(0).state(view="page")["workers"] == []


def test_pictures_are_shared_and_no_more_than_one_a_second(large: Shown) -> None:
    now = [1.0]
    later: list[Callable[[], object]] = []
    got: list[FleetPicture] = []
    walks: list[int] = []

    def fleet() -> Fleet:
        walks.append(1)
        return large.node.fleet

    photographer = Photographer(fleet, lambda: now[0], later.append)
    photographer.take(got.append)
    photographer.take(got.append)
    assert got == []
    while later:
        later.pop(0)()
    assert len(got) == 2
    assert got[0] is got[1]
    photographer.take(got.append)
    assert got[2] is got[0]
    now[0] += 1.5
    photographer.take(got.append)
    assert len(walks) == 2


def test_pages_cover_the_fleet_once(large: Shown) -> None:
    picture = picture_of(large)
    seen = []
    for offset in range(0, 5000, 700):
        page = page_of(picture, {"offset": str(offset), "limit": "700"})
        assert page["total"] == 5000
        seen += [worker["worker_id"] for worker in page["workers"]]
    assert seen == [f"worker-{i}" for i in range(5000)]
    assert page_of(picture, {"offset": "6000"})["workers"] == []
    assert len(page_of(picture, {})["workers"]) == fleetview.LIMIT_DEFAULT
    assert page_of(picture, {"limit": "0"})["workers"] == []


def test_filters_and_orders(large: Shown) -> None:
    picture = picture_of(large)
    assert [w["worker_id"] for w in page_of(picture, {"q": "WORKER-499"})["workers"]] == ["worker-499", *(f"worker-499{i}" for i in range(10))]
    assert page_of(picture, {"state": STARTING})["total"] == picture.states[STARTING]
    model = picture.models[0][0]
    assert all(model in w["models"] + w["loading"] for w in page_of(picture, {"model": model})["workers"])
    for sort in fleetview.SORTS:
        for order in ("asc", "desc"):
            page_of(picture, {"sort": sort, "order": order})
    waiting = [w["waiting"] for w in page_of(picture, {"sort": "waiting", "order": "desc", "limit": "1000"})["workers"]]
    assert waiting == sorted((v.waiting for v in picture.workers), reverse=True)[:1000]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"limit": "-1"}, "limit='-1': must be a whole number, at most 1000"),
        ({"limit": "1001"}, "limit='1001'"),
        ({"limit": "1e3"}, "limit='1e3'"),
        ({"limit": "\u0663"}, "limit="),
        ({"offset": "x" * 500}, "offset="),
        ({"sort": "secret"}, "sort='secret': must be one of worker_id, state"),
        ({"order": "up"}, "order='up': must be asc or desc"),
    ],
)
def test_a_query_that_makes_no_sense_is_named(small: Shown, query: dict[str, str], message: str) -> None:
    with pytest.raises(BadQuery, match=re.escape(message)) as raised:
        page_of(picture_of(small), query)
    assert len(str(raised.value)) < 200


def test_names_sort_as_people_expect() -> None:
    names = ["worker-10", "worker-9", "b", "worker-", "a-2", "7", "worker-10-a"]
    assert sorted(names, key=natural) == ["7", "a-2", "b", "worker-", "worker-9", "worker-10", "worker-10-a"]


def test_the_grid_is_bounded(monkeypatch: pytest.MonkeyPatch, large: Shown) -> None:
    picture = picture_of(large)
    assert len(cells_of(picture)["cells"]) == 5000
    monkeypatch.setattr(fleetview, "CELLS_MAX", 900)
    grid = cells_of(picture)
    assert grid["step"] == 6
    assert [cell[0] for cell in grid["cells"]] == [f"worker-{i}" for i in range(0, 5000, 6)]


def view(**changes: Any) -> fleetview.WorkerView:
    calm = fleetview.WorkerView("worker-1", READY, True, "10.0.0.1", 8000, "h100-80g", 1, 0.2, 8, 0, 0, 256, 0.1, 0.0, ("m",), ())
    return calm._replace(**changes)


@pytest.mark.parametrize(
    ("changes", "low", "high"),
    [
        ({}, 0.05, 0.2),
        ({"waiting": 9, "kv_used": 0.94, "wait_s": 28.7}, 1.01, 99.0),
        ({"kv_used": 0.94}, 0.93, 0.95),
        ({"wait_s": 1.9}, 0.9, 1.0),
        ({"waiting": 300}, 1.01, 2.0),
    ],
)
def test_a_worker_is_painted_by_the_worst_of_its_measures(changes: dict[str, Any], low: float, high: float) -> None:
    """The page paints above 1 hot, and up to it from pale to dark."""
    one = view(**changes)
    ((_, _, load, *_),) = cells_of(FleetPicture(0.0, (one,), {READY: 1}, 0, 0, 0, 0, 0.0, ()))["cells"]
    assert low <= load <= high


def test_figures_of_a_worker_that_is_silent_or_gone_are_marked_as_last_known() -> None:
    shown = Shown(3)
    for row, state in zip(shown.node.fleet.rows.values(), ("SUSPECT", "DEAD", "LEFT"), strict=True):
        row.state = state
    *_, picture = walk(shown.node.fleet, 46.5)
    assert picture is not None
    assert [(one.current, one.age_s > 40.0) for one in picture.workers] == [(False, True)] * 3
    assert all(one.current for one in picture_of(Shown(3)).workers)
    assert (picture.running, picture.slots) == (picture.workers[0].running, picture.workers[0].slots), "who is gone is no part of the totals"
    page = fleet_page().body.decode()
    assert 'NOT_CURRENT = ["SUSPECT", "DEAD", "LEFT"]' in page
    assert list(fleetview.NOT_CURRENT) == ["SUSPECT", "DEAD", "LEFT"]


def test_history_counts_by_the_second() -> None:
    history = History()
    assert history.as_columns() == {name: [] for name in fleetview.Second._fields}
    for second in range(fleetview.HISTORY_S + 5):
        for i in range(second % 3):
            tell(history, RequestRouted(0.0, "r", "m", "w", ACTIONS[i], float(i), 0.0))
        history.tick()
    columns = history.as_columns()
    assert len(columns["routed"]) == fleetview.HISTORY_S
    assert columns["routed"][-3:] == [(fleetview.HISTORY_S + k) % 3 for k in (2, 3, 4)]
    assert sum(history.routed.values()) == sum(second % 3 for second in range(fleetview.HISTORY_S + 5))
    assert history.by_model["m"] == sum(history.routed.values())


def test_the_state_can_be_said_in_json(small: Shown) -> None:
    state = json.loads(json.dumps(small.state(view="page"), allow_nan=False))
    assert state["summary"]["workers"] == state["total"] == 5
    assert state["requests"]["refused"] == {SATURATED: 6}
    assert len(state["history"]["routed"]) == 60
    assert "grid" not in small.state()


# --- the page -------------------------------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_from_outside() -> None:
    page = fleet_page()
    text = page.body.decode()
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:)""", text)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert "innerHTML" not in text
    assert "eval(" not in text
    assert not re.search(r"<[^>]+\s(?:style|on\w+)=", text)
    assert "unsafe" not in page.policy
    assert page.policy.startswith("default-src 'none'; script-src 'sha256-")


@pytest.mark.skipif(shutil.which("node") is None, reason="install Node.js (Debian: apt-get install nodejs)")
def test_the_script_parses(tmp_path: Path) -> None:
    script = re.search(r"<script>(.*?)</script>", fleet_page().body.decode(), re.DOTALL)
    assert script is not None
    path = tmp_path / "page.js"
    path.write_text(script[1])
    subprocess.run(["node", "--check", str(path)], check=True, timeout=60)


@pytest.fixture(scope="module")
def hostile() -> Shown:
    shown = Shown(3)
    shown.node.receive(Envelope(HOSTILE, 1, 1, 0.0, report(shown.node.catalog.names, 2)), ("10.0.0.9", 8000), 0.0)
    return shown


def browse(shown: Shown, tmp_path: Path, *flags: str) -> str:
    """What Chromium makes of the page: its DOM after a while of its own virtual time."""
    assert CHROMIUM is not None
    server = HttpServer(("127.0.0.1", 0), shown.site())
    try:
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--no-first-run", "--disable-dev-shm-usage", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000",
            "--enable-logging=stderr", *flags, server.url + "/",
        ]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        try:
            out, err = process.communicate(timeout=120)
        finally:
            with_group_ended(process)
    finally:
        server.close()
    assert "Refused to" not in err, err
    assert "Uncaught" not in err, err
    assert "Content Security Policy" not in err, err
    return out


def with_group_ended(process: subprocess.Popen[str]) -> None:
    """Chromium's helpers are of its own process group: end what is left of it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


chromium = pytest.mark.skipif(CHROMIUM is None, reason="install chromium (Debian: apt-get install chromium)")


def text_of(dom: str, element_id: str) -> str:
    found = re.search(rf'id="{element_id}"[^>]*>(.*?)</div>', dom, re.DOTALL)
    assert found, f"no {element_id} in the page"
    return re.sub(r"<[^>]+>", " ", found[1]).strip()


@chromium
def test_a_browser_shows_a_small_fleet(small: Shown, tmp_path: Path) -> None:
    dom = browse(small, tmp_path, "--dump-dom")
    assert "<title>5 of 5 ready" in dom
    assert re.search(r'id="status"[^>]*class="good"[^>]*>ready<', dom)
    assert text_of(dom, "v-workers").split()[0] == "5"
    assert re.search(r'id="b-workers"><i class="READY"', dom)
    assert [found[1] for name in ("slots", "kv") if (found := re.search(rf'id="p-{name}">([^<]*)<', dom))] == ["22 %", "18 %"]
    placed = re.search(r'id="placements">(.*?)</tbody>', dom)
    assert placed is not None
    assert re.findall(r"<td>([^<]*)</td><td[^>]*>([^<]*)<", placed[1]) == [("model is there", "1,237"), ("cold start", "137"), ("migration", "0")]
    for i in range(5):
        assert f">worker-{i}</td>" in dom
    assert "every queue full" in dom
    assert dom.count('class="line') >= 4
    assert "1 to 5 of 5" in dom


@chromium
def test_a_browser_shows_a_large_fleet_a_page_at_a_time(large: Shown, tmp_path: Path) -> None:
    dom = browse(large, tmp_path, "--dump-dom")
    assert "1 to 50 of 5,000" in dom
    assert len(re.findall(r">worker-\d+</td>", dom)) == 50
    assert re.search(r'aria-label="Load of 5,000 workers', dom)


@chromium
def test_what_a_worker_calls_itself_is_shown_and_not_run(hostile: Shown, tmp_path: Path) -> None:
    dom = browse(hostile, tmp_path, "--dump-dom")
    assert "&lt;img src=x onerror=alert(1)&gt;" in dom
    assert "<img" not in dom


@chromium
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_browser_draws_it_in_light_and_dark(large: Shown, tmp_path: Path, theme: str) -> None:
    picture = tmp_path / f"{theme}.png"
    dark = ["--blink-settings=preferredColorScheme=0"] if theme == "dark" else ["--blink-settings=preferredColorScheme=1"]
    browse(large, tmp_path, f"--screenshot={picture}", "--window-size=1280,1500", *dark)
    assert picture.read_bytes().startswith(b"\x89PNG")
    if keep := os.environ.get("KEEP_SCREENSHOTS"):
        shutil.copy(picture, keep)
