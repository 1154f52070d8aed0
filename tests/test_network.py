"""The simulated network: each quality does what it says, and the books balance."""

from __future__ import annotations

import math
import random
from collections import Counter
from statistics import mean, median
from typing import Any

import pytest
from roles import report

from sllm.protocol.messages import Envelope, LoadReport, ReportAck, ScheduleRequest
from sllm.virtual.network import CUT, QUEUE, RANDOM, Latency, Link, Network, estimated_bytes

ENVELOPE = Envelope("a", 1, 1, 0.0, ReportAck(1, 1))
N = 20_000


def network(**qualities: Any) -> Network:
    net = Network(Link(qualities.pop("latency", Latency("constant", 0.1)), **qualities))
    net.rng = random.Random(1)
    return net


def arrivals(net: Network, count: int = N) -> list[tuple[float, float]]:
    return [copy for _ in range(count) for copy in net.carry("a", "b", ENVELOPE, 1.0)]


def close(count: int, probability: float) -> bool:
    """Within six standard deviations of what N draws give."""
    return abs(count - N * probability) < 6 * math.sqrt(N * probability * (1 - probability))


@pytest.mark.parametrize(
    ("latency", "low", "high", "centre"),
    [
        (Latency("constant", 0.1), 0.1, 0.1, 0.1),
        (Latency("uniform", 0.1, 0.3), 0.1, 0.3, 0.2),
        (Latency("exponential", 0.1, 0.2), 0.1, 9.0, 0.3),
        (Latency("lognormal", 0.1, 0.5), 0.0, 9.0, 0.1 * 2.718281828 ** (0.5**2 / 2)),
    ],
)
def test_latency_follows_its_law(latency: Latency, low: float, high: float, centre: float) -> None:
    rng = random.Random(1)
    draws = [latency.draw_s(rng) for _ in range(N)]
    assert low <= min(draws)
    assert max(draws) <= high
    assert mean(draws) == pytest.approx(centre, rel=0.02)
    if latency.kind == "lognormal":
        assert median(draws) == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("wrong", [("gaussian", 1.0, 0.0), ("constant", -1.0, 0.0), ("uniform", 2.0, 1.0), ("constant", float("nan"), 0.0)])
def test_a_latency_that_makes_no_sense_is_refused(wrong: tuple[str, float, float]) -> None:
    with pytest.raises(ValueError, match="latency"):
        Latency(*wrong)


def test_a_plain_network_draws_nothing() -> None:
    net = network()
    before = net.rng.getstate()
    assert arrivals(net, 3) == [(1.1, -1.0)] * 3
    assert net.rng.getstate() == before
    assert net.plain_latency_s == 0.1


def test_loss_duplication_reordering_and_corruption_come_as_often_as_they_say() -> None:
    net = network(loss=0.1, duplicate=0.2, reorder=0.3, reorder_extra_s=1.0, corrupt=0.05)
    copies = arrivals(net)
    assert close(net.lost[RANDOM], 0.1)
    assert close(round(net.duplicated / 0.9), 0.2)
    assert close(round(sum(at > 1.1 for at, _ in copies) / len(copies) * N), 0.3)
    flipped = [flip for _, flip in copies if flip >= 0.0]
    assert len(flipped) == net.corrupted
    assert close(round(len(flipped) / len(copies) * N), 0.05)
    assert mean(flipped) == pytest.approx(0.5, abs=0.05), "any bit is as likely"
    assert max(at for at, _ in copies) <= 2.1
    assert net.sent + net.duplicated == len(copies) + sum(net.lost.values()) == net.in_flight + sum(net.lost.values())


def test_load_reports_are_counted_beside_the_rest() -> None:
    net = network(loss=0.5, duplicate=0.5)
    copies = [copy for _ in range(N) for copy in net.carry("w", "c", Envelope("w", 1, 1, 0.0, report()), 1.0)]
    assert net.lost_by_kind[LoadReport] == net.lost[RANDOM] == net.lost.total()
    assert net.duplicated_by_kind[LoadReport] == net.duplicated == len(copies) - (N - net.lost_by_kind[LoadReport]) > 0
    arrivals(net)
    net.cut(None, None)
    arrivals(net, 1)
    assert net.lost_by_kind[LoadReport] < net.lost.total(), "an acknowledgement is none"
    assert net.duplicated_by_kind[LoadReport] < net.duplicated
    before = net.lost_by_kind[LoadReport]
    assert list(net.carry("w", "c", Envelope("w", 1, 2, 0.0, report()), 1.0)) == []
    assert net.lost_by_kind[LoadReport] == before + 1


def test_a_cut_is_one_way_and_ends() -> None:
    net = network()
    rule = net.cut(["a"], ["b", "c"])
    assert list(net.carry("a", "b", ENVELOPE, 0.0)) == []
    assert list(net.carry("a", "d", ENVELOPE, 0.0)) == [(0.1, -1.0)]
    assert list(net.carry("b", "a", ENVELOPE, 0.0)) == [(0.1, -1.0)]
    assert net.plain_latency_s is None
    net.remove(rule)
    assert list(net.carry("a", "b", ENVELOPE, 0.0)) == [(0.1, -1.0)]
    assert net.plain_latency_s == 0.1
    assert net.lost == Counter({CUT: 1})
    net.remove(rule)  # ended already


def test_rules_add_up_and_the_later_one_wins() -> None:
    net = network()
    first = net.degrade(None, ["b"], loss=0.5, corrupt=0.1)
    second = net.degrade(["a"], None, loss=1.0)
    assert net.link_between("a", "b") == Link(net.link.latency, loss=1.0, corrupt=0.1)
    assert net.link_between("c", "b") == Link(net.link.latency, loss=0.5, corrupt=0.1)
    assert net.link_between("a", "c") == Link(net.link.latency, loss=1.0)
    assert net.link_between("c", "a") == net.link
    net.remove(first)
    cut = net.cut(None, ["b"])
    assert net.link_between("a", "b") is None
    net.remove(second, cut)
    assert net.link_between("a", "b") == net.link


def test_equal_rules_are_told_apart() -> None:
    net = network()
    rules = [net.cut(["a"], None), net.cut(["a"], None)]
    net.remove(rules[0])
    assert net.link_between("a", "b") is None
    net.remove(rules[1])
    assert net.link_between("a", "b") is not None


def test_an_unknown_quality_is_an_error_at_once() -> None:
    with pytest.raises(ValueError, match="lateness"):
        network().degrade(None, None, lateness=1.0)


def test_bandwidth_makes_datagrams_queue_and_a_long_queue_drops_them() -> None:
    size = estimated_bytes(ENVELOPE)
    net = network(bandwidth_bytes_per_s=size * 10.0, queue_max_s=0.45)
    times = [at for at, _ in arrivals(net, 8)]
    assert times == pytest.approx([1.0 + 0.1 + 0.1 * place for place in range(1, 6)])
    assert net.lost == Counter({QUEUE: 3})
    assert [at for at, _ in net.carry("a", "c", ENVELOPE, 1.0)] == pytest.approx([1.2]), "each link has a queue of its own"
    assert [at for at, _ in net.carry("a", "b", ENVELOPE, 9.0)] == pytest.approx([9.2])


def test_longer_messages_count_as_longer() -> None:
    short = Envelope("a", 1, 1, 0.0, ScheduleRequest("r", "m", 1, 1, 1, 0.0, ()))
    long = Envelope("a", 1, 1, 0.0, ScheduleRequest("r", "m" * 100, 1, 1, 1, 0.0, ("worker-1",)))
    assert estimated_bytes(long) > estimated_bytes(short) + 100
