"""One rule for each field, wherever it is written: whatever the configuration, the catalogue or a recording lets through can be sent, heard and repeated."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from roles import CATALOG, MODEL, Talk, ask, changed, configuration, coordinator, report
from test_worker import request, worker
from wire_samples import CODEC, SAMPLES, envelope

from config import HOST, ID, Config, ConfigError
from entrypoint_worker import main as worker_main
from sllm.engine import LlmEngine
from sllm.models.catalogue import Catalog
from sllm.protocol import limits
from sllm.protocol.errors import UsageError
from sllm.protocol.messages import (
    MESSAGES,
    REFUSED_INVALID,
    REFUSED_TOO_LARGE,
    REFUSED_UNKNOWN_MODEL,
    Dispatch,
    Envelope,
    InferenceRequest,
    InferenceResponse,
    LoadReport,
    Message,
    ReportAck,
    ScheduleRequest,
    ScheduleResponse,
)
from sllm.protocol.node import Rejected
from sllm.workload import RecordedWriter, Request
from worker import Worker

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "faults"
LOCAL = {"DEPLOYMENT_MODE": "local"}


def decoded(message: Any, **header: Any) -> Any:
    return CODEC.decode(CODEC.encode(Envelope("worker-2", 1, 1, 100.0, message).replace(**header))).message


# --- what is drawn for tests is what the rules accept ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("message", "name"), [(m, n) for m in MESSAGES for n in m.RULES], ids=lambda x: x if isinstance(x, str) else x.__name__)
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 32))
def test_what_a_kind_draws_it_accepts(message: type[Message], name: str, seed: int) -> None:
    kind = message.RULES[name]
    value = kind.draw(Random(seed))
    assert kind.accepts(value), value
    assert kind.mend(value) == value


# --- configuration ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "most", "field"),
    [("WORKER_ID", limits.ID_MAX_BYTES, ("ScheduleResponse", "worker_id")), ("ADVERTISE_HOST", limits.HOST_MAX_BYTES, ("ScheduleResponse", "host"))],
)
def test_the_longest_that_a_variable_may_say_everybody_can_repeat(name: str, most: int, field: tuple[str, str]) -> None:
    attribute = name.lower()
    longest = "h" * most
    assert getattr(Config.from_env({**LOCAL, name: longest}), attribute) == longest
    response = changed(SAMPLES[ScheduleResponse], **{field[1]: longest})
    assert getattr(decoded(response), field[1]) == longest
    for text in ("h" * (most + 1), "\ud55c" * (most // 3 + 1), "a\x00b", "a\nb", "\u202eb"):
        with pytest.raises(ConfigError) as caught:
            Config.from_env({**LOCAL, name: text})
        assert str(caught.value).startswith(f"{name}=")
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=f"{most} bytes"):
        Config.from_env({**LOCAL, name: "h" * (most + 1)})


@pytest.mark.parametrize("host", ["::1%a\0b", "a b", "h" * 254, "\u00e9", "a/b"])
def test_a_host_is_one_thing_everywhere(host: str) -> None:
    assert limits.host_problem(host)
    for name in ("ADVERTISE_HOST", "BIND_HOST", "COORDINATOR_HOST"):
        with pytest.raises(ConfigError, match=name):
            Config.from_env({**LOCAL, name: host})
    for message in (LoadReport, ScheduleResponse):
        with pytest.raises(ValueError, match=r"\.host="):
            CODEC.encode(envelope(changed(SAMPLES[message], host=host)))


BOUNDS = {  # fields of the configuration whose largest value is what a message can carry
    "report_interval_s": limits.REPORT_INTERVAL_MAX_S, "slots": limits.SLOTS_MAX, "queue_max": limits.QUEUE_MAX, "placements_max": limits.PLACEMENTS_MAX,
}  # fmt: skip
TEXTS = st.one_of(
    st.text(max_size=70), st.text("aZ09._~:%-", max_size=260), st.text("aZ.\u00e9\ud55c \n\ud800", max_size=260),
    st.builds(lambda letter, size: letter * size, st.sampled_from("h:\u00e9\ud55c\0"), st.integers(0, 260)),
)  # fmt: skip


@pytest.mark.parametrize("name", BOUNDS)
def test_a_setting_goes_as_far_as_a_message_can_carry_and_no_further(name: str) -> None:
    (field,) = (field for field in dataclasses.fields(Config) if field.name == name)
    assert field.metadata["high"] == BOUNDS[name]


@settings(max_examples=500, deadline=None)
@given(TEXTS)
def test_the_rules_for_texts_are_those_of_messages_to_the_word(text: str) -> None:
    assert HOST.problem(text) == limits.host_problem(text)
    assert ID.problem(text) == limits.id_problem(text)


def test_the_rules_for_texts_take_the_same_characters() -> None:
    for code in [*range(0x500), 0x200B, 0x202E, 0x2028, 0xD55C, 0xD800, 0xFEFF, 0x1F600]:
        for text in (chr(code), f"a{chr(code)}b"):
            assert HOST.problem(text) == limits.host_problem(text)
            assert ID.problem(text) == limits.id_problem(text)


@pytest.mark.parametrize("letter", ["h", "\u00e9", "\ud55c"])
@pytest.mark.parametrize("most", [limits.ID_MAX_BYTES, limits.HOST_MAX_BYTES])
def test_the_rules_for_texts_end_at_the_same_length(letter: str, most: int) -> None:
    for size in range(most // len(letter.encode()) - 2, most + 3):
        assert HOST.problem(letter * size) == limits.host_problem(letter * size)
        assert ID.problem(letter * size) == limits.id_problem(letter * size)


def test_the_name_of_a_machine_that_is_no_id_is_an_error_that_names_its_variable() -> None:
    with pytest.raises(ConfigError, match=r"HOSTNAME=.*63 bytes.*WORKER_ID"):
        Config.from_env({"DEPLOYMENT_MODE": "docker", "HOSTNAME": "h" * 64})
    assert Config.from_env({"DEPLOYMENT_MODE": "docker", "HOSTNAME": "h" * 64, "WORKER_ID": "w"}).worker_id == "w"


def test_what_a_configured_worker_says_every_other_role_can_repeat() -> None:
    """Every setting at its largest at once."""
    most: dict[str, Any] = {"advertise_host": "h" * limits.HOST_MAX_BYTES, "worker_id": "w" * limits.ID_MAX_BYTES}
    for field in dataclasses.fields(Config):
        if field.name in ("slots", "queue_max", "report_interval_s", "placements_max"):
            kind: Any = type(field.default)
            most[field.name] = kind(field.metadata["high"])
    config = dataclasses.replace(configuration(), **most)
    engine = LlmEngine(CATALOG, CATALOG.get_hardware(config.hardware), slots=config.slots)
    node = Worker(
        config, CATALOG, engine, ("c", 1), Random(1), 1, node_id=config.worker_id, codec=CODEC, advertise=(config.advertise_host, 65535)
    )  # fmt: skip
    node.handle_timer(0.0)
    ((data, _),) = node.datagrams_to_send()
    central, _ = coordinator()
    central.codec = CODEC
    central.receive_datagram(data, ("10.0.0.7", 1), 1.0)
    assert central.reports_accepted == 1
    Talk(central).say("c", ask(exclude=tuple(f"w{i}" for i in range(limits.PLACEMENTS_MAX))), 1.5)
    for datagram, _ in central.datagrams_to_send():
        assert CODEC.decode(datagram)


# --- catalogue and recordings ------------------------------------------------------------------------------------------------------------


def catalogue(tmp_path: Path, text: str) -> Catalog:
    path = tmp_path / "catalogue.toml"
    path.write_text(text, encoding="utf-8")
    return Catalog.from_file(str(path))


@pytest.mark.parametrize(("name", "count"), [("m" * 128, 1), ("\ud55c" * 42, 1), ("m" * 121, 100_000), ("m" * 126, 9)])
def test_a_name_of_the_catalogue_can_be_sent(tmp_path: Path, name: str, count: int) -> None:
    names = catalogue(tmp_path, f'[model."{name}"]\npreset = "opt-2.7b"\ncount = {count}\n').names
    assert decoded(changed(SAMPLES[ScheduleRequest], model=names[-1])).model == names[-1]


@pytest.mark.parametrize(("name", "count"), [("m" * 129, 1), ("\ud55c" * 43, 1), ("m" * 122, 100_000), ("m" * 127, 9), ("m\u202e", 1), ("m\\u0000", 1)])
def test_a_name_that_cannot_be_sent_ends_with_the_limit_in_bytes(tmp_path: Path, name: str, count: int) -> None:
    with pytest.raises(UsageError) as caught:
        catalogue(tmp_path, f'[model."{name}"]\npreset = "opt-2.7b"\ncount = {count}\n')
    assert "128 bytes" in str(caught.value) or "printable" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("table", ['[hardware.h]\npreset = "h100-80g"\nslots = 100001\n', '[hardware.h]\npreset = "h100-80g"\ngpu_memory_gb = 1e300\n'])
def test_hardware_that_no_report_could_describe_is_refused(tmp_path: Path, table: str) -> None:
    with pytest.raises(UsageError, match="at most"):
        catalogue(tmp_path, f'[model.m]\npreset = "opt-2.7b"\n{table}')


@pytest.mark.skipif(not SHARED.exists(), reason="its input is a catalogue of the project's own laboratory, ../shared/faults: nothing to do here")
def test_the_names_in_another_script_end_with_the_limit_in_bytes() -> None:
    with pytest.raises(UsageError, match=r"cjk_names.toml.*1 to 128 bytes"):
        Catalog.from_file(str(SHARED / "cjk_names.toml"))


@pytest.mark.parametrize("text", ["\ud55c" * 43, "r" * 129, "\u202e"])
def test_a_recording_has_no_id_that_could_not_travel(tmp_path: Path, text: str) -> None:
    with RecordedWriter(str(tmp_path / "trace")) as writer:
        with pytest.raises(ValueError, match="cannot be recorded"):
            writer.write(Request(0.0, text, "m", 1, 1, 1))
        writer.write(Request(0.0, "\ud55c" * 42, "m", 1, 1, 1))


# --- numbers of the header --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["sequence", "incarnation"])
def test_numbers_that_no_answer_could_repeat_are_refused_and_not_sent(field: str) -> None:
    """A report's sequence comes back in a ReportAck."""
    report_ = SAMPLES[LoadReport]
    good = CODEC.encode(envelope(report_, limits.NUMBER_MAX, incarnation=limits.NUMBER_MAX))
    heard = CODEC.decode(good)
    assert CODEC.encode(envelope(ReportAck(heard.incarnation, heard.sequence)))
    with pytest.raises(ValueError, match=field):
        CODEC.encode(envelope(report_).replace(**{field: 1 << 63}))
    start = 16 if field == "sequence" else 8
    bad = good[:start] + (1 << 63).to_bytes(8, "big") + good[start + 8 : -16]
    with pytest.raises(Rejected, match="number"):
        CODEC.decode(bad + CODEC.keyring.tag(1, bad))


# --- at the worker ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [({"max_tokens": 0}, REFUSED_INVALID), ({"prompt_tokens": -1}, REFUSED_INVALID), ({"max_tokens": limits.TOKENS_MAX}, REFUSED_TOO_LARGE)],
)
def test_a_worker_refuses_what_its_engine_refuses(changes: dict[str, Any], outcome: str) -> None:
    _, talk = worker()
    talk.say("c", request(**changes), 1.0)
    (response,) = talk.heard(InferenceResponse)
    assert response.outcome == outcome
    talk.say("c", request("r1", 2), 1.0)
    talk.run_to(9.0)
    (response,) = talk.heard(InferenceResponse)
    assert response.outcome == "completed"


def test_a_model_that_the_engine_does_not_have_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    node, talk = worker()
    monkeypatch.setattr(LlmEngine, "submit", lambda *_: dict[str, int]()["no such model"])
    talk.say("c", request(), 1.0)
    (response,) = talk.heard(InferenceResponse)
    assert response.outcome == REFUSED_UNKNOWN_MODEL
    assert not node.service.jobs


def test_a_model_too_large_to_load_at_the_start_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[model.llama-2-70b]\npreset = "llama-2-70b"\n', encoding="utf-8")
    for name, value in {**LOCAL, "MODEL_CATALOG": str(path), "DEMO_MODELS": "1", "HARDWARE": "a5000-24g", "WORKER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    assert worker_main([]) == 2
    assert "DEMO_MODELS=1: " in capsys.readouterr().err


def test_a_dispatch_of_a_life_that_never_was_costs_no_acknowledgement_for_long() -> None:
    """Any client can name any life of the coordinator in a request; the coordinator's own word puts it right."""
    node, talk = worker()
    talk.say("coordinator", ReportAck(7, 1), 0.5, incarnation=7)
    talk.say("c", request("r0", dispatch=Dispatch(limits.NUMBER_MAX, 5)), 1.0)
    assert node.reporter._receipts.epoch == limits.NUMBER_MAX
    talk.say("coordinator", ReportAck(7, 2), 1.5, incarnation=7)
    talk.say("c", request("r1", dispatch=Dispatch(7, 3)), 2.0)
    assert (node.reporter._receipts.epoch, node.reporter._receipts.high) == (7, 3)


def test_a_coordinator_whose_clock_was_set_back_is_heard_again() -> None:
    node, talk = worker()
    talk.say("coordinator", ReportAck(20, 1), 1.0, incarnation=20)
    talk.say("coordinator", ReportAck(10, 1), 2.0, incarnation=10)
    assert node.reporter._heard_epoch == 20
    talk.say("coordinator", ReportAck(10, 2), 1.0 + configuration().worker_timeout_s, incarnation=10)
    assert node.reporter._heard_epoch == 10
    talk.say("c", request(dispatch=Dispatch(10, 1)), 12.0)
    assert (node.reporter._receipts.epoch, node.reporter._receipts.high) == (10, 1)


def test_a_report_with_an_hours_interval_and_slots_beyond_measure_is_refused() -> None:
    for changes in ({"interval_s": 3600.0}, {"slots": 1 << 62}):
        with pytest.raises(ValueError, match="LoadReport"):
            CODEC.encode(envelope(report(**changes)))
    with pytest.raises(ValueError, match="max_tokens"):
        CODEC.encode(envelope(InferenceRequest("r", MODEL, 1, 0, Dispatch(1, 1), "w")))
