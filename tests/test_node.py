"""The shell of every role: what is stale, repeated or not for it changes nothing but a counter."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from roles import report

from sllm.messages import Address, Envelope, FirstToken, LoadReport, ReportAck
from sllm.node import FRESH_WITHIN_S, Node

REPORT = report(port=0, hardware="h")


class Ear(Node):
    def __init__(self) -> None:
        super().__init__("ear", 1)
        self.heard: list[Envelope] = []
        self.handlers = {FirstToken: self._hear}

    def _hear(self, envelope: Envelope, addr: Address, now: float) -> None:
        self.heard.append(envelope)


def envelope(sequence: int, *, incarnation: int = 1, wall_s: float = 100.0, message: object = None, sender: str = "a") -> Envelope:
    return Envelope(sender, incarnation, sequence, wall_s, message or FirstToken("r", 0.0))  # type: ignore[arg-type]


def hear(node: Ear, *envelopes: Envelope) -> list[int]:
    for one in envelopes:
        node.receive(one, ("x", 1), 100.0)
    return [e.sequence for e in node.heard]


def test_a_repeat_is_refused_and_a_late_one_is_not() -> None:
    node = Ear()
    assert hear(node, *(envelope(n) for n in (1, 3, 2, 3, 2, 70, 6, 5, 6))) == [1, 3, 2, 70, 6]
    assert node.rejected == {"replayed": 4}  # 3 and 2 again, 5 too far below 70 to tell, 6 again


def test_an_older_life_is_refused_and_a_newer_one_starts_afresh() -> None:
    node = Ear()
    assert hear(node, envelope(9), envelope(1, incarnation=2), envelope(10, incarnation=1)) == [9, 1]
    assert node.rejected == {"old_incarnation": 1}


@pytest.mark.parametrize(("wall_s", "heard"), [(100.0 - FRESH_WITHIN_S, 1), (100.0 + FRESH_WITHIN_S, 1), (69.9, 0), (130.1, 0), (float("nan"), 0)])
def test_only_fresh_datagrams_are_heard(wall_s: float, heard: int) -> None:
    node = Ear()
    assert len(hear(node, envelope(1, wall_s=wall_s))) == heard
    assert node.rejected["stale_time"] == 1 - heard


def test_what_is_not_for_this_role_is_refused() -> None:
    node = Ear()
    hear(node, envelope(1, message=ReportAck(1, 1)))
    assert node.rejected == {"unexpected": 1}


def test_senders_and_message_types_are_numbered_apart() -> None:
    node = Ear()
    assert hear(node, envelope(1), envelope(1, sender="b")) == [1, 1]
    for _ in range(2):
        node.send(FirstToken("r", 0.0), ("y", 2), 5.0)
    node.send(ReportAck(1, 1), ("y", 2), 5.0)
    assert [envelope[2] for envelope, _ in node.outbox] == [1, 2, 1]


def test_reports_are_left_to_the_fleet_table() -> None:
    node = Ear()
    node.handlers[LoadReport] = node._hear
    assert hear(node, envelope(1, message=REPORT), envelope(1, message=REPORT)) == [1, 1]


ARRIVALS = st.lists(
    st.tuples(
        st.sampled_from([FirstToken("r", 0.0), ReportAck(1, 1), REPORT]),
        st.sampled_from("ab"),
        st.integers(1, 2),
        st.integers(1, 9) | st.integers(1, 200),
        st.sampled_from([100.0, 100.0, 100.0, 60.0, float("nan")]),
    ),
    max_size=40,
)


@given(ARRIVALS)
def test_an_envelope_is_judged_like_the_same_bytes(arrivals: list[tuple[object, str, int, int, float]]) -> None:
    """The usual cases are decided in `receive` itself, without `judge`, which is what bytes are put to."""
    node, twin = Ear(), Ear()
    for ear in (node, twin):
        ear.handlers[LoadReport] = ear._hear
    for message, sender, incarnation, sequence, wall_s in arrivals:
        node.receive(envelope(sequence, incarnation=incarnation, wall_s=wall_s, message=message, sender=sender), ("x", 1), 100.0)
        reason = twin.judge(type(message), sender, incarnation, sequence, wall_s, 100.0)
        if reason:
            twin.rejected[reason] += 1
        assert node.rejected == twin.rejected
        assert node._guard == twin._guard
