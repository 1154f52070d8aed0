"""A report that would be too long says what matters most, marks itself partial, and says nothing that is not so."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from roles import configuration, report
from wire_samples import CODEC, NAMES, envelope

from experiments.harness import fingerprint, silent
from sllm.engine import LlmEngine
from sllm.models.catalogue import Catalog
from sllm.protocol import limits
from sllm.protocol.fitting import SHORT_NAMES, WHOLE_NAMES, always_fits, fitted, same_models
from sllm.protocol.messages import LoadReport
from sllm.run.live import LiveRun
from sllm.run.virtual import VirtualRun
from worker import Worker

MODELS = 'preset = "opt-2.7b"\ncount = 600\n'
WORST = {
    "host": "h" * limits.HOST_MAX_BYTES, "hardware": "h" * limits.NAME_MAX_BYTES, "slots": limits.SLOTS_MAX, "gpu_free_bytes": limits.NUMBER_MAX,
    "epoch": limits.NUMBER_MAX, "dispatch_high": limits.NUMBER_MAX, "dispatch_missing": tuple(range((1 << 63) - 66, (1 << 63) - 2)),
    "queue_max": limits.QUEUE_MAX, "blocked": limits.QUEUE_MAX,
    "waiting": limits.QUEUE_MAX,
}  # fmt: skip
"""The other fields at their longest."""


def sent(one: LoadReport) -> LoadReport:
    """As it is heard, from the longest sender there is."""
    data = CODEC.encode(envelope(one, limits.NUMBER_MAX).replace(sender_id="w" * limits.ID_MAX_BYTES))
    heard = CODEC.decode(data).message
    assert isinstance(heard, LoadReport)
    return heard


@settings(deadline=None, max_examples=30)
@given(st.lists(NAMES, unique=True, min_size=1, max_size=12), st.integers(0, 700), st.randoms(use_true_random=False))
def test_whatever_a_worker_holds_its_report_can_be_sent(stems: list[str], size: int, rng: Random) -> None:
    pool = [f"{stem}{i}"[:32] for i in range(size) for stem in stems]
    pool = list(dict.fromkeys(pool))
    gpu, host, disk = (tuple(sorted(rng.sample(pool, rng.randint(0, len(pool))))) for _ in range(3))
    busy = tuple(name for name in gpu if rng.random() < 0.5)
    loading = tuple((name, rng.random()) for name in rng.sample(pool, rng.randint(0, len(pool))) if name not in gpu)
    whole = report(gpu_models=gpu, busy_models=busy, host_models=host, disk_models=disk, loading=loading, **WORST)
    cut = fitted(whole)
    assert sent(cut) == cut
    said, had = cut.engine, whole.engine
    for name in ("gpu_models", "busy_models", "host_models", "disk_models", "loading"):
        kept, all_ = getattr(said, name), getattr(had, name)
        assert [item for item in all_ if item in set(kept)] == list(kept), "in the same order, nothing made up"
    assert set(said.busy_models) <= set(said.gpu_models), "one without the other would call it idle"
    assert set(had.busy_models) & set(said.gpu_models) == set(said.busy_models), "what serves is not called idle"
    assert cut.partial == (not same_models(said, had))
    assert cut.partial or cut is whole


def names(stem: str, count: int) -> tuple[str, ...]:
    return tuple(f"{stem}-{i:04d}" for i in range(count))


def test_what_matters_most_is_said_first() -> None:
    gpu = names("gpu", 40)
    said = fitted(
        report(
            loading=tuple((name, 1.0) for name in names("loading", 30)), gpu_models=gpu, busy_models=gpu[10:20], host_models=names("host", 300),
            disk_models=names("disk", 580),
        )
    )  # fmt: skip
    one = said.engine
    assert (len(one.loading), one.gpu_models, one.busy_models, len(one.host_models)) == (30, gpu, gpu[10:20], 300)
    assert 0 < len(one.disk_models) < 580
    assert said.partial
    crowded = fitted(report(gpu_models=names("gpu", 600), busy_models=names("gpu", 600)[550:], host_models=names("host", 10))).engine
    assert len(crowded.busy_models) == 50, "those that serve before those that do not"
    assert len(crowded.gpu_models) == limits.NAMES_MAX


@pytest.mark.parametrize("size", [1, 32, 128])
def test_a_report_that_fits_is_left_alone(size: int) -> None:
    whole = report(disk_models=tuple(f"{i}".rjust(size, "m")[:size] for i in range(SHORT_NAMES if size > 1 else 10)))
    assert fitted(whole) is whole


def test_snapshots_that_differ_in_one_list_do_not_name_the_same_models() -> None:
    one = report().engine
    assert same_models(one, one.replace(running=3))
    assert not any(same_models(one, one.replace(**{name: (("x", 1.0),)})) for name in ("gpu_models", "busy_models", "loading", "host_models", "disk_models"))


def test_a_small_catalogue_is_never_looked_at_again() -> None:
    assert always_fits(Catalog.demo(60).names)
    held = names("m", WHOLE_NAMES)
    assert always_fits(held)
    whole = report(
        gpu_models=held, busy_models=held, host_models=held, disk_models=held, loading=tuple((name, 1.0) for name in held), **WORST
    )  # fmt: skip
    assert sent(whole) == whole
    assert not always_fits(names("m", 200))


# --- the worker, and whole runs ------------------------------------------------------------------------------------------------------------


def catalogue(tmp_path: Path) -> str:
    path = tmp_path / "catalogue.toml"
    path.write_text("".join(f'[model."team-{i % 7}/opt-2.7b-fine-tune-{i:04d}"]\npreset = "opt-2.7b"\n' for i in range(600)), encoding="utf-8")
    return str(path)


def test_a_worker_that_holds_hundreds_of_models_reports(tmp_path: Path) -> None:
    catalog = Catalog.from_file(catalogue(tmp_path))
    config = configuration()
    node = Worker(config, catalog, LlmEngine(catalog, catalog.get_hardware(config.hardware)), ("c", 1), Random(1), 1, node_id="w", codec=CODEC)
    node.handle_timer(0.0)
    ((data, _),) = node.datagrams_to_send()
    said = CODEC.decode(data).message
    assert isinstance(said, LoadReport)
    assert said.partial
    assert len(said.engine.disk_models) > 100


def test_a_run_with_hundreds_of_models_is_the_same_as_objects_and_as_bytes(tmp_path: Path) -> None:
    digests = []
    for wire in (False, True):
        run = VirtualRun(configuration(workers=2, rate_per_s=2.0, duration_s=10.0, models=600, model_catalog=catalogue(tmp_path)), silent(wire=wire))
        run.conduct()
        run.close()
        results = run.results()
        assert results["invariants"]["violations"] == []
        assert results["requests"]["completed"] == results["requests"]["sent"] > 0
        assert any(row.report.partial for row in run.system.tracker.fleet)
        digests.append(fingerprint(results))
    assert digests[0] == digests[1]


def test_it_runs_live(tmp_path: Path) -> None:
    config = configuration(workers=2, rate_per_s=4.0, duration_s=5.0, models=600, model_catalog=catalogue(tmp_path), speedup=10.0)
    run = LiveRun(config, silent(virtual=False))
    run.conduct()
    run.close()
    results = run.results()
    assert results["invariants"]["violations"] == []
    assert results["requests"]["completed"] == results["requests"]["sent"] > 0
