"""The shell of every role: what is stale, repeated or not for it changes nothing but a counter."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from roles import report

from sllm.protocol.messages import Address, AnyEnvelope, Envelope, FirstToken, LoadReport, Message, ReportAck
from sllm.protocol.node import Node
from sllm.protocol.replay import FRESH_WITHIN_S, REPLAY_WINDOW, ReplayWindow

REPORT = report(port=0, hardware="h")


class Ear(Node):
    def __init__(self) -> None:
        super().__init__("ear", 1)
        self.heard: list[AnyEnvelope] = []
        self.handlers = {FirstToken: self._hear}

    def _hear(self, envelope: AnyEnvelope, addr: Address, now: float) -> None:
        self.heard.append(envelope)


def envelope(sequence: int, *, incarnation: int = 1, wall_s: float = 100.0, message: object = None, sender: str = "a") -> AnyEnvelope:
    return Envelope(sender, incarnation, sequence, wall_s, message or FirstToken("r", 0.0))


def hear(node: Ear, *envelopes: AnyEnvelope) -> list[int]:
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


def test_a_clock_set_back_costs_a_sender_no_more_than_the_timeout() -> None:
    """Its next life looks older than the last one, which is silent from then on: a life silent for the timeout is forgotten."""
    node = Ear()
    node.receive(envelope(9, incarnation=20), ("x", 1), 100.0)
    node.receive(envelope(1, incarnation=10, wall_s=105.0), ("x", 1), 105.0)
    node.receive(envelope(10, incarnation=20, wall_s=107.0), ("x", 1), 107.0)  # it was not silent after all
    node.receive(envelope(2, incarnation=10, wall_s=116.9), ("x", 1), 107.0 + node.life_timeout_s - 0.1)
    assert node.rejected == {"old_incarnation": 2}
    at = 107.0 + node.life_timeout_s
    node.receive(envelope(3, incarnation=10, wall_s=at), ("x", 1), at)
    node.receive(envelope(3, incarnation=10, wall_s=at), ("x", 1), at)
    node.receive(envelope(11, incarnation=20, wall_s=at), ("x", 1), at)  # and a newer one is a newer one, at any time
    assert [(e.incarnation, e.sequence) for e in node.heard] == [(20, 9), (20, 10), (10, 3), (20, 11)]
    assert node.rejected == {"old_incarnation": 2, "replayed": 1}


def test_a_number_out_of_reach_locks_nobody_out_for_ever() -> None:
    """Somebody else spoke for a life, with a number that its own will never reach. When all that could be replayed is stale, its own are heard again."""
    node = Ear()
    hear(node, envelope(7), envelope((1 << 63) - 1), envelope(8))
    at = 100.0 + 2.0 * FRESH_WITHIN_S
    for later in (at, at + 0.1):  # a replayed datagram may be as old as that, and no older
        node.receive(envelope(9, wall_s=later), ("x", 1), later)
        assert node.rejected == {"replayed": 2}, "once at the beginning, and once now"
    node.receive(envelope(8, wall_s=at), ("x", 1), at + 0.1)
    node.receive(envelope(10, wall_s=at), ("x", 1), at + 0.1)
    assert [e.sequence for e in node.heard] == [7, (1 << 63) - 1, 9, 8, 10]
    assert node.rejected == {"replayed": 2}


@pytest.mark.parametrize("silent_s", [0.0, 9.9, 10.0, 10.1, 30.0, 54.9])
def test_a_repeat_is_refused_however_long_its_life_has_been_silent(silent_s: float) -> None:
    """Its sender's clock is fast: what it said is fresh for almost a minute."""
    node = Ear()
    hear(node, envelope(9, wall_s=125.0))
    node.receive(envelope(9, wall_s=125.0), ("x", 1), 100.0 + silent_s)
    assert node.rejected == {"replayed": 1}


@pytest.mark.parametrize("message", [FirstToken("r", 0.0), REPORT])
@pytest.mark.parametrize("wall_offset_s", [0.0, -500.0, 1_764_000_000.0])
def test_a_life_that_begins_in_the_future_is_refused(message: object, wall_offset_s: float) -> None:
    """It would lock the real sender out. Virtual time, from 0, counts as a clock as well: there the wall clock may be set back behind the beginning."""
    node = Ear()
    node.handlers[LoadReport] = node._hear
    node.wall_offset_s = wall_offset_s
    wall_s = 100.0 + wall_offset_s
    latest = int((max(100.0, wall_s) + FRESH_WITHIN_S) * 1e9)
    for incarnation, sender in ((latest, "a"), (latest + 1000, "b"), ((1 << 63) - 1, "a")):
        node.receive(envelope(1, incarnation=incarnation, wall_s=wall_s, message=message, sender=sender), ("x", 1), 100.0)
    assert [e.sender_id for e in node.heard] == ["a"]
    assert node.rejected == {"future_incarnation": 2}


def test_a_full_guard_keeps_those_who_speak_and_forgets_at_a_constant_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sllm.protocol.replay.GUARDED_MAX", 100)
    node = Ear()
    for number in range(1000):
        hear(node, envelope(1, sender=f"flood-{number}"))
        if number % 40 == 0:
            hear(node, envelope(number + 1, sender="a"))
            hear(node, envelope(max(1, number - 39), sender="a"))  # what it said last is known yet
            assert node.rejected == {"replayed": number // 40 + 1}
    (senders,) = node._replay.values()
    assert len(senders._windows) <= 100


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
    assert [envelope.sequence for envelope, _ in node.outbox] == [1, 2, 1]


def test_reports_are_left_to_the_fleet_table() -> None:
    node = Ear()
    node.handlers[LoadReport] = node._hear
    assert hear(node, envelope(1, message=REPORT), envelope(1, message=REPORT)) == [1, 1]


class NaiveWindow:
    """What `ReplayWindow` is to admit, with a set of all numbers instead of bits."""

    def __init__(self, incarnation: int, sequence: int) -> None:
        self.incarnation = incarnation
        self.used = {sequence}

    def admit(self, sequence: int) -> bool:
        if sequence in self.used or not max(1, max(self.used) - REPLAY_WINDOW) <= sequence:
            return False
        self.used.add(sequence)
        return True


@pytest.mark.parametrize("gap", [0, 1, 2, 63, 64, 65, 66, 1000])
@pytest.mark.parametrize("first", [1, 2, 63, 64, 65, 66, 1000])
def test_the_window_admits_each_number_once_as_far_back_as_it_reaches(first: int, gap: int) -> None:
    """The first number of a life, a later one, and then every number that there is, twice, those next to the highest first."""
    window, naive = ReplayWindow(1, first, 0.0), NaiveWindow(1, first)
    numbers = [first + gap, *range(first + gap + 2, -1, -1), *range(first + gap + 3)]
    assert [window.admit(number, 0.0) for number in numbers] == [naive.admit(number) for number in numbers]


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
def test_a_node_judges_as_a_set_of_all_numbers_would(arrivals: list[tuple[Message, str, int, int, float]]) -> None:
    node = Ear()
    node.handlers[LoadReport] = node._hear
    known: dict[str, NaiveWindow] = {}

    def reason_for(message: Message, sender: str, incarnation: int, sequence: int, wall_s: float) -> str:
        if isinstance(message, ReportAck):
            return "unexpected"
        if wall_s != 100.0:
            return "stale_time"
        window = known.get(sender)
        if isinstance(message, LoadReport):
            return ""  # its reader orders reports
        if window is None or incarnation > window.incarnation:
            known[sender] = NaiveWindow(incarnation, sequence)
            return ""
        if incarnation < window.incarnation:
            return "old_incarnation"
        return "" if window.admit(sequence) else "replayed"

    for message, sender, incarnation, sequence, wall_s in arrivals:
        node.rejected.clear()
        node.heard.clear()
        one = envelope(sequence, incarnation=incarnation, wall_s=wall_s, message=message, sender=sender)
        reason = reason_for(message, sender, incarnation, sequence, wall_s)
        node.receive(one, ("x", 1), 100.0)
        assert dict(node.rejected) == ({reason: 1} if reason else {})
        assert node.heard == ([] if reason else [one])


def test_a_life_that_began_while_the_clock_was_ahead_begins_anew_when_it_is_set_right() -> None:
    """Peers would refuse it as one of the future. A life that they may have heard of stays as it is."""
    for ahead_s, again in ((3600.0, True), (20.0, False)):
        ear = Ear()
        sender = Node("x", round((10.0 + ahead_s) * 1e9), wall_offset_s=ahead_s)
        sender.send(FirstToken("r", 0.0), ("ear", 1), 12.0)
        sender.set_wall_clock(0.0, 15.0)
        sender.send(FirstToken("r", 0.0), ("ear", 1), 16.0)
        for sent, _ in sender.outbox:
            ear.receive(sent, ("x", 1), 16.0)
        assert [e.incarnation == round((10.0 + ahead_s) * 1e9) for e in ear.heard] == ([False] if again else [True, True])
