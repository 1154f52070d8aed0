"""What a workload can be beyond independent requests at one rate: shares, stages, sessions, users, traces laid over one another."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from sllm.protocol.errors import UsageError
from sllm.protocol.messages import HIGH, LOW, NORMAL
from sllm.workload import Repeat, Request, WorkloadSpec, generate, open_trace, write_recorded
from sllm.workload.lengths import LENGTHS, parse_lengths
from sllm.workload.popularity import Shares
from sllm.workload.sessions import SessionLaw
from sllm.workload.shares import parse_priorities, read_shares
from sllm.workload.stages import Stages

MODELS = [f"model-{i}" for i in range(8)]


def requests(seed: int = 1, **spec: Any) -> list[Request]:
    return list(generate(WorkloadSpec(**{"rate_per_s": 20.0, "duration_s": 30.0} | spec), MODELS, seed))


def near(samples: list[float], expected: float) -> bool:
    """The mean over seeds is not significantly off (99.9 %, normal approximation)."""
    return abs(statistics.fmean(samples) - expected) <= 3.29 * statistics.stdev(samples) / math.sqrt(len(samples))


# --- shares -----------------------------------------------------------------------------------------------------------------------------


def test_a_mix_replaces_popularity_and_nothing_else(tmp_path: Path) -> None:
    plain, mixed = requests(), requests(mix="model-3=3, model-1=1, model-5=0")
    assert [(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in mixed] == [(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in plain]
    counts = Counter(r.model for r in mixed)
    assert set(counts) == {"model-3", "model-1"}
    assert abs(counts["model-3"] - 0.75 * len(mixed)) < 4 * math.sqrt(len(mixed) * 0.75 * 0.25)
    file = tmp_path / "mix.toml"
    file.write_text('model-3 = 3\n"model-1" = 1\n')
    assert requests(mix=str(file)) == mixed


def test_priorities_come_by_their_shares_and_change_nothing_else(tmp_path: Path) -> None:
    plain, ranked = requests(), requests(priorities="high=1,normal=2,low=1")
    assert [r._replace(priority=NORMAL) for r in ranked] == plain
    counts = Counter(r.priority for r in ranked)
    for which, share in ((HIGH, 0.25), (NORMAL, 0.5), (LOW, 0.25)):
        assert abs(counts[which] - share * len(ranked)) < 4 * math.sqrt(len(ranked) * share * (1 - share))
    trace = tmp_path / "t.csv"
    trace.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n" + "0,1,1\n" * 200)
    assert {r.priority for r in generate(WorkloadSpec(trace=str(trace), priorities="high=1,low=1"), MODELS, 1)} == {HIGH, LOW}


@pytest.mark.parametrize("text", ["a", "a=", "=3", "a=x", "a=-1", "a=inf", "a=nan", "a=1,a=2", "a=0", "a=1,", ""])
def test_shares_that_are_none_are_named(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--mix"):
        read_shares(text, "--mix")


@pytest.mark.parametrize(("content", "said"), [("a = true\n", "'a'"), ("a = 'x'\n", "'a'"), ("a.b = 1\n", "quotes"), ("a\n", "line 1"), ("", "above 0")])
def test_a_file_of_shares_that_says_nothing_clear_is_named(content: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "mix.toml"
    file.write_text(content)
    with pytest.raises(UsageError, match=said) as caught:
        read_shares(str(file), "--mix")
    assert str(file) in str(caught.value)


def test_unknown_priorities_and_models_are_named() -> None:
    with pytest.raises(UsageError, match="'urgent' is no priority; there are high, normal, low"):
        parse_priorities("urgent=1", "--priorities")
    with pytest.raises(UsageError, match="'nope' is not a model that requests can ask for"):
        requests(mix="nope=1")


def test_an_item_without_a_share_is_never_drawn_even_as_the_last() -> None:
    class Highest(Random):
        def random(self) -> float:
            return 1.0 - 2.0**-53

    assert Shares.of({"a": 1.0, "b": 0.0}).draw(Highest()) == "a"


# --- lengths ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "most"), [("azure-conv", 14050), ("fixed:512,128", 512), ("lognormal:100,200,50,60", 10**7), ("lognormal:100,200,50,60,900", 900)]
)
def test_the_means_that_a_law_states_are_those_of_its_draws(text: str, most: int) -> None:
    lengths = parse_lengths(text)
    rng = Random(3)
    draws = [lengths.draw(rng) for _ in range(20_000)]
    assert max(max(pair) for pair in draws) <= most
    assert statistics.fmean(prompt for prompt, _ in draws) == pytest.approx(lengths.prompt_mean, rel=0.05)
    assert statistics.fmean(output for _, output in draws) == pytest.approx(lengths.output_mean, rel=0.05)


def test_lengths_may_be_separated_as_before() -> None:
    assert parse_lengths("fixed:5:7").draw(Random(1)) == parse_lengths("fixed:5,7").draw(Random(1)) == (5, 7)


@pytest.mark.parametrize("text", ["lognormal:1,2,3", "lognormal:100,50,10,20", "lognormal:a,b,c,d", "lognormal:100,200,50,60,0", "fixed:1.5,2"])
def test_lengths_that_make_no_law_name_all_laws(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_lengths(text)
    assert all(name + law.form in str(caught.value) for name, law in LENGTHS.items())


# --- stages -----------------------------------------------------------------------------------------------------------------------------


def test_stages_go_in_straight_lines() -> None:
    stages = Stages.parse("10s:4,20s:4,0s:8,1m:0")
    assert (stages.duration_s, stages.requests) == (90.0, 20.0 + 80.0 + 240.0)
    assert list(stages.stretch([0.0, 5.0, 20.0, 60.0, 99.9999999, 100.0, 339.0])) == pytest.approx(
        [0.0, 5.0, 10.0, 20.0, 29.9999999, 30.0, 90.0 - math.sqrt(2 * 1.0 / (8 / 60))], abs=1e-6
    )


@pytest.mark.parametrize("arrivals", ["poisson", "gamma", "deterministic"])
def test_every_arrival_process_follows_the_stages(arrivals: str) -> None:
    spec = {"arrivals": arrivals, "cv": 2.0, "stages": "30s:20,30s:20,30s:0", "duration_s": None}
    times = [[r.arrival_s for r in requests(seed, **spec)] for seed in range(40)]
    assert all(run == sorted(run) and run[-1] < 90.0 for run in times)
    for begin, end, expected in ((0.0, 30.0, 300.0), (30.0, 60.0, 600.0), (60.0, 90.0, 300.0), (0.0, 15.0, 75.0)):
        counts = [float(sum(begin <= at < end for at in run)) for run in times]
        assert all(abs(count - expected) <= 1 for count in counts) if arrivals == "deterministic" else near(counts, expected), (begin, end)


def test_stages_leave_lengths_and_models_as_they_were() -> None:
    plain, staged = requests(), requests(stages="30s:20", duration_s=None)
    assert all(a[2:] == b[2:] for a, b in zip(plain, staged, strict=False))


@pytest.mark.parametrize("text", ["30:5", "30s", "30s:-5", "30s:x", "30s:0", "0s:5", "30s:5,", "1e3s:5", "10000000h:5"])
def test_stages_that_are_none_are_named(text: str) -> None:
    with pytest.raises(UsageError, match="stages"):
        WorkloadSpec(stages=text)


# --- sessions ---------------------------------------------------------------------------------------------------------------------------


def test_each_turn_repeats_the_whole_of_the_turn_before() -> None:
    made = requests(sessions="turns=4,gap=2", lengths="fixed:100,20")
    by_id = {r.request_id: r for r in made}
    assert [r.request_id for r in made] == [f"r{i}" for i in range(len(made))]
    assert [r.arrival_s for r in made] == sorted(r.arrival_s for r in made)
    later = [r for r in made if r.repeats is not None and not r.repeats.request_id.startswith("before-")]
    assert len(later) > 100
    for turn in later:
        assert turn.repeats is not None
        before = by_id[turn.repeats.request_id]
        assert (turn.model, turn.priority) == (before.model, before.priority)
        assert turn.repeats.tokens == before.prompt_tokens + before.output_tokens == turn.prompt_tokens - 100
        assert before.arrival_s < turn.arrival_s
    assert len({r.repeats.request_id for r in later if r.repeats}) == len(later)  # no turn is followed twice


def test_sessions_keep_the_rate_of_requests_from_the_first_second() -> None:
    spec = {"sessions": "turns=5,gap=10,longest=10000000"}
    runs = [requests(seed, **spec) for seed in range(60)]
    assert near([float(len(run)) for run in runs], 600.0)
    assert near([float(sum(r.arrival_s < 5.0 for r in run)) for run in runs], 100.0)
    assert near([sum(r.repeats is not None for r in run) / len(run) for run in runs], 0.8)  # all turns but the first of five


def test_a_session_that_would_grow_too_long_begins_anew() -> None:
    made = requests(sessions="turns=50,gap=0.1,longest=1000", lengths="fixed:100,20")
    assert max(r.prompt_tokens + r.output_tokens for r in made) == 960  # eight turns of 120
    assert any(r.repeats is None for r in made)


@pytest.mark.parametrize("text", ["turns", "turns=0.5", "gap=-1", "longest=1.5", "length=3", "turns=nan", ""])
def test_sessions_that_are_none_are_named(text: str) -> None:
    with pytest.raises(UsageError, match="sessions"):
        SessionLaw.parse(text)


def test_the_results_say_that_repeated_prompts_save_nothing() -> None:
    workload = generate(WorkloadSpec(sessions="turns=3"), MODELS, 1)
    assert workload.describe()["sessions"] == {"turns": 3.0, "gap_s": 10.0, "longest_tokens": 14000, "prefix_cache": False}
    assert "computed again" in workload.warnings[0]


def test_a_recording_keeps_what_prompts_repeat(tmp_path: Path) -> None:
    made, path = requests(sessions="turns=4,gap=2", priorities="high=1,low=1"), str(tmp_path / "w.jsonl")
    write_recorded(path, made)
    assert list(generate(WorkloadSpec(trace=path), MODELS, 9)) == made


@pytest.mark.parametrize("value", ['["r0"]', '["r0", 0]', '["r0", 10]', '["r0", "5"]', '["", 5]', "7", '["r0", true]'])
def test_a_recording_with_a_wrong_repeat_is_refused(value: str, tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    row = f'{{"arrival_s":0,"request_id":"r1","model":"m","prompt_tokens":10,"output_tokens":1,"repeats":{value}}}'
    path.write_text(f'{{"schema":"sllm-workload","version":1}}\n{row}\n')
    with pytest.raises(UsageError, match="line 2, column repeats"):
        list(open_trace(str(path)))


def test_a_repeat_that_cannot_be_read_back_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="repeats"):
        write_recorded(str(tmp_path / "w"), [Request(0.0, "a", "m", 5, 1, NORMAL, Repeat("b", 5))])


# --- users ------------------------------------------------------------------------------------------------------------------------------


def drive(takes_s: float, seed: int = 1, **spec: Any) -> list[Request]:
    """Closed-loop load on a fleet that takes so long for each request."""
    workload = generate(WorkloadSpec(**{"duration_s": 20.0, "concurrency": 5} | spec), MODELS, seed)
    waiting = list(workload)
    sent = []
    while waiting:
        request = waiting.pop(waiting.index(min(waiting, key=lambda r: r.arrival_s)))
        sent.append(request)
        following = workload.following(request.request_id, request.arrival_s + takes_s)
        waiting += [following] if following is not None else []
    return sent


def test_a_user_sends_when_the_last_request_has_ended() -> None:
    sent = drive(2.0)
    by_user: dict[str, list[float]] = {}
    for request in sent:
        by_user.setdefault(request.request_id.partition("-")[0], []).append(request.arrival_s)
    assert len(by_user) == 5
    for times in by_user.values():
        assert times[0] == 0.0
        assert all(1.9999999 <= later - earlier <= 2.00001 for earlier, later in itertools.pairwise(times))
    assert max(r.arrival_s for r in sent) < 20.0


def test_users_who_think_do_so_for_the_mean_time() -> None:
    rates = [len(drive(1.0, seed, think_s=3.0, duration_s=200.0)) / 200.0 for seed in range(30)]
    assert near(rates, 5 / 4.0)  # five users, each with a cycle of 1 s + 3 s


def test_what_a_user_asks_for_does_not_depend_on_the_fleet() -> None:
    quick, slow = ({r.request_id: r[2:] for r in drive(takes_s, sessions="turns=3", priorities="high=1,low=1")} for takes_s in (0.5, 3.0))
    assert len(slow) < len(quick)
    assert slow == {request_id: quick[request_id] for request_id in slow}


def test_a_user_has_one_request_at_a_time_and_one_following_each() -> None:
    workload = generate(WorkloadSpec(duration_s=20.0, concurrency=2), MODELS, 1)
    first = next(workload)
    assert workload.following("unknown", 1.0) is None
    assert workload.following(first.request_id, 1.0) is not None
    assert workload.following(first.request_id, 1.0) is None
    assert generate(WorkloadSpec(), MODELS, 1).following("r0", 1.0) is None


def test_users_of_sessions_go_on_where_they_were() -> None:
    sent = drive(1.0, sessions="turns=4", lengths="fixed:100,20", duration_s=60.0)
    by_id = {r.request_id: r for r in sent}
    later = [r for r in sent if r.repeats is not None]
    assert len(later) > len(sent) / 2
    assert all(r.repeats is not None and by_id[r.repeats.request_id].model == r.model for r in later)


# --- a trace at another rate --------------------------------------------------------------------------------------------------------------


def trace_of(tmp_path: Path, times: list[float]) -> str:
    path = tmp_path / "t.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens,model\n" + "".join(f"{at},{10 + i},5,m{i % 3}\n" for i, at in enumerate(times)))
    return str(path)


def test_twice_the_rate_is_each_request_twice_in_the_same_time(tmp_path: Path) -> None:
    times = [float(i * i) for i in range(30)]
    path = trace_of(tmp_path, times)
    made = list(generate(WorkloadSpec(trace=path, trace_rate=2.0), MODELS, 1))
    assert Counter(r.prompt_tokens for r in made) == Counter({10 + i: 2 for i in range(30)})
    assert [r.request_id for r in made] == [f"r{i}" for i in range(60)]
    assert [r.arrival_s for r in made] == sorted(r.arrival_s for r in made)
    assert made[-1].arrival_s <= times[-1]
    assert {(r.prompt_tokens - 10) % 3: r.model for r in made} == {0: "model-0", 1: "model-1", 2: "model-2"}
    moved = {(r.arrival_s - times[r.prompt_tokens - 10]) % times[-1] for r in made if r.arrival_s not in times}
    assert max(moved) - min(moved) < 1e-9  # one copy, moved as a whole
    assert 0.0 < min(moved) <= 60.0


def test_parts_of_a_rate_thin_a_copy(tmp_path: Path) -> None:
    path = trace_of(tmp_path, [0.1 * i for i in range(2000)])
    for rate in (0.25, 1.0, 2.5):
        count = len(list(generate(WorkloadSpec(trace=path, trace_rate=rate), MODELS, 1)))
        assert abs(count - 2000 * rate) < 4 * math.sqrt(2000 * 0.25), rate
    short = list(generate(WorkloadSpec(trace=path, trace_rate=3.0, duration_s=10.0), MODELS, 1))
    assert len(short) == 300
    assert max(r.arrival_s for r in short) < 10.0
    first = list(generate(WorkloadSpec(trace=path, trace_rate=2.5), MODELS, 1))
    assert first == list(generate(WorkloadSpec(trace=path, trace_rate=2.5), MODELS, 1))
    assert first != list(generate(WorkloadSpec(trace=path, trace_rate=2.5), MODELS, 2))


def test_a_recording_is_replayed_as_it_stands(tmp_path: Path) -> None:
    path = str(tmp_path / "w.jsonl")
    write_recorded(path, requests())
    for spec in ({"trace_rate": 2.0}, {"mix": "model-1=1"}, {"priorities": "high=1"}):
        with pytest.raises(UsageError, match="is a recording"):
            generate(WorkloadSpec(trace=path, **spec), MODELS, 1)


def test_a_mix_for_a_trace_that_names_all_its_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="names its model; --model-map"):
        generate(WorkloadSpec(trace=trace_of(tmp_path, [0.0, 1.0]), mix="model-1=1"), MODELS, 1)


# --- own columns ------------------------------------------------------------------------------------------------------------------------

STRANGER = "start;tokens in;tokens out;llm;user\n"
COLUMNS = "arrival=start,prompt=Tokens In,output=tokens out,model=llm"


@pytest.mark.parametrize(
    ("times", "unit"),
    [(("1700000000.5", "1700000002"), ""), (("1700000000500", "1700000002000"), ",unit=ms"), (("2023-11-14T22:13:20.5Z", "2023-11-14 22:13:22"), "")],
)
@pytest.mark.parametrize("delimiter", [";", ",", "\t", "|"])
def test_a_strangers_file_is_read_by_its_columns(times: tuple[str, str], unit: str, delimiter: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text((STRANGER + f"{times[0]};100;20;gpt;a\n{times[1]};300;40;claude;b\n").replace(";", delimiter))
    with open_trace(str(path), COLUMNS + unit) as trace:
        assert trace.names_models
        rows = list(trace)
    assert [(round(r.arrival_s, 6), r.prompt_tokens, r.output_tokens, r.model) for r in rows] == [(0.0, 100, 20, "gpt"), (1.5, 300, 40, "claude")]


def test_known_columns_are_known_in_lower_case_and_with_another_delimiter(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("timestamp;contexttokens;generatedtokens;model\n2023-11-16 18:15:46.68;374;44;x\n")
    with open_trace(str(path)) as trace:
        assert (trace.format_name, [r.model for r in trace]) == ("azure", ["x"])


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(STRANGER + "0;1;1;x;a\n")
    with pytest.raises(UsageError) as caught:
        open_trace(str(path), "arrival=begin,prompt=tokens in,output=words")
    assert str(caught.value).startswith(f"{path}, line 1: no column arrival='begin', output='words'")
    assert "there are 'start', 'tokens in', 'tokens out', 'llm', 'user'" in str(caught.value)
    with pytest.raises(UsageError, match=r"--columns arrival=NAME,prompt=NAME,output=NAME"):
        open_trace(str(path))
    path.write_text("arrived_at,num_prefill_tokens\n0,1\n")
    with pytest.raises(UsageError, match="for vidur it lacks num_decode_tokens"):
        open_trace(str(path))
    path.write_text('{"a": 1}\n')
    with pytest.raises(UsageError, match="is for CSV"):
        open_trace(str(path), COLUMNS)


@pytest.mark.parametrize(
    "text", ["arrival=a", "arrival=a,prompt=b,output=c,unit=min", "arrival=a,prompt=b,output=c,size=d", "arrival=a,arrival=b,prompt=c,output=d", "x"]
)
def test_columns_that_are_none_are_named(text: str) -> None:
    with pytest.raises(UsageError, match="columns"):
        WorkloadSpec(columns=text)


def test_a_bad_time_in_own_columns_names_its_place(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(STRANGER + "0;1;1;x;a\nlate;1;1;x;a\n")
    with pytest.raises(UsageError, match=r"line 3, column start: 'late' is not a time in s"):
        list(open_trace(str(path), COLUMNS))
