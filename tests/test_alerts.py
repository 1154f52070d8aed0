"""The alerts of the guide, through promtool, on what simulated fleets say: each has a run that fires it, and is silent in one where all is in order."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scrapes import INTERVAL_S, Scrapes
from simulated import Fleet

from sllm.virtual.faults import parse_schedule

GUIDE = Path(__file__).resolve().parent.parent / "DEPLOYMENT.md"
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="install promtool (Debian: apt-get install prometheus)")

IN_ORDER = """
fault = [
  {at = 600.0, kind = "crash", hosts = ["coordinator"], for = 5.0},
  {at = 900.0, kind = "drain", hosts = ["worker-0"], for = 100000.0},
  {at = 1200.0, kind = "drain", hosts = ["worker-1", "worker-2", "worker-3", "worker-4"], stagger = 30.0, for = 25.0},
  {at = 1800.0, kind = "crash", hosts = ["worker-2"], for = 30.0},
  {at = 2100.0, kind = "degrade", loss = 0.05, duplicate = 0.05, reorder = 0.05, reorder_extra_ms = 500.0, for = 300.0},
]
"""


def alerts() -> dict[str, tuple[str, str]]:
    """Of the guide's table: name -> (expression, for)."""
    table = GUIDE.read_text(encoding="utf-8").split("| alert | expression | for | why |")[1].split("\n\n")[0]
    found = {}
    for row in table.splitlines():
        cells = [cell.strip().replace("\\|", "|") for cell in row.replace("\\|", "\0").split("|")]
        if len(cells) == 6 and "`" in cells[2]:
            found[cells[1]] = cells[2].strip("`").replace("\0", "|"), cells[3]
    return found


def simulate(faults: str = "", *, minutes: float = 45.0, act: Callable[[Scrapes], None] | None = None, **options: Any) -> Scrapes:
    options = {"workers": 5, "rate_per_s": 1.0, **options}
    fleet = Fleet(schedule=parse_schedule(faults, 1) if faults else None, duration_s=60.0 * minutes, check=False, **options)
    scrapes = Scrapes(fleet)
    if act is not None:
        fleet.world.every(INTERVAL_S, lambda: act(scrapes))
    fleet.world.run(60.0 * minutes)
    return scrapes


def fired(scrapes: Scrapes, folder: Path, expected: list[str], which: str = ".+") -> None:
    """Hold that of the alerts `which` (a regular expression) exactly the `expected` fire some time in the run."""
    rules = [{"alert": name, "expr": expression, "for": hold} for name, (expression, hold) in alerts().items()]
    (folder / "rules.json").write_text(json.dumps({"groups": [{"name": "guide", "rules": rules}]}))  # JSON is YAML
    end = f"{int(scrapes.scraped * INTERVAL_S)}s"
    firing = f'group by (alertname) (max_over_time(ALERTS{{alertname=~"{which}",alertstate="firing"}}[1d]))'
    samples = [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in expected]
    tests = {
        "rule_files": ["rules.json"], "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s", "input_series": scrapes.as_promtool(),
                "promql_expr_test": [{"expr": firing, "eval_time": end, "exp_samples": samples}],
            }
        ],
    }  # fmt: skip
    (folder / "tests.json").write_text(json.dumps(tests))
    done = subprocess.run(["promtool", "test", "rules", str(folder / "tests.json")], text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def dropping(scrapes: Scrapes) -> None:
    scrapes.kernel_drops += 10


def unread(scrapes: Scrapes) -> None:
    scrapes.log_drops += 10


FIRING: dict[str, dict[str, Any]] = {
    "coordinator not ready": {"faults": 'fault = [{at = 300.0, kind = "crash", hosts = ["coordinator"], for = 120.0}]', "minutes": 12},
    "expiry held": {"faults": 'fault = [{at = 300.0, kind = "crash", hosts = ["worker-*"], for = 180.0}]', "minutes": 12},
    "workers lost": {"faults": 'fault = [{at = 300.0, kind = "crash", hosts = ["worker-3"]}]', "minutes": 12},
    "refusals": {"workers": 1, "rate_per_s": 60.0, "minutes": 15, "queue_threshold": 5},
    "slow start": {"workers": 1, "rate_per_s": 30.0, "minutes": 15, "queue_threshold": 1_000_000, "queue_max": 1_000_000, "request_timeout_s": 60.0},
    "many cold starts": {"workers": 1, "rate_per_s": 0.2, "minutes": 30, "hardware": "a5000-24g"},
    "datagrams dropped": {"act": dropping, "minutes": 12},
    "datagrams refused": {"faults": 'fault = [{at = 300.0, kind = "clock_jump", hosts = ["worker-3"], by = 60.0}]', "minutes": 15},
    "log lines dropped": {"act": unread, "minutes": 12},
}


def test_every_alert_of_the_guide_has_a_run_that_fires_it() -> None:
    assert list(alerts()) == list(FIRING)


@needs_promtool
@pytest.mark.parametrize("name", FIRING)
def test_it_fires(name: str, tmp_path: Path) -> None:
    fired(simulate(**FIRING[name]), tmp_path, [name], name)


@needs_promtool
def test_none_fires_when_all_is_in_order(tmp_path: Path) -> None:
    """Restarts of the coordinator, a scale-down, a rolling restart, a worker that crashes and comes back, a network that is a little worse for a while."""
    scrapes = simulate(IN_ORDER)
    lost = scrapes.series['sllm_workers_lost_total{instance="coordinator",job="sllm"}']
    assert lost[-1] == "1", "it was noticed all the same"
    fired(scrapes, tmp_path, [])
