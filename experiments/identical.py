#!/usr/bin/env python3
"""Tells whether two checkouts compute the same: runs the same commands in both, and compares every output.

    python3 experiments/identical.py --against TREE                 this checkout against another one, half a minute
    python3 experiments/identical.py --tree TREE --save DIR         keep the outputs of a checkout,
    python3 experiments/identical.py --against DIR                  and hold this checkout against them later, with the same commands and the same input files
    python3 experiments/identical.py --pure                         the compiled modules of this checkout against a copy without them

These outputs must be equal: the exit status, stdout and stderr, the rows of `--requests-csv` and the workload of `--record` to the byte, the results without
`wall`, and the HTML report without its figures of wall time. A setting that only one side knows is printed and is no difference; versions are not compared. Of
the live run only the numbers of requests sent and completed are compared.

The program imports nothing of the project and uses only the command line of a checkout, so the modules of the two checkouts may be arranged differently.
Exit status: 0 all the same, 1 a configuration differs or fails, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = "centralized_simulation.py"
MANIFEST = "saved.json"  # in a folder of saved outputs: which commands made them
JOBS = 2
TIMEOUT_S = 120.0  # of one command; each takes seconds

LIVE, AZURE = "live", "azure"
EXPECTED = {"refused": 2, "threshold": 4}  # exit status of configurations that must fail
CONFIGURATIONS = {
    "synthetic": "--duration 60",
    "large-fleet": "--workers 200 --rate 100 --models 40 --duration 10",
    "seed": "--seed 20 --workers 8 --rate 10 --duration 40",
    "gamma": "--arrivals gamma --cv 8 --rate 10 --duration 30",
    "deterministic": "--arrivals deterministic --rate 10 --zipf 0 --duration 30",
    "stages": "--stages 0s:5,10s:5,0s:40,5s:40,10s:0 --arrivals gamma --cv 2",
    "concurrency": "--concurrency 20 --think 2 --duration 30",
    "fixed-lengths": "--lengths fixed:512,128 --rate 10 --duration 20",
    "lognormal": "--lengths lognormal:400,700,80,150,8000 --rate 10 --duration 20",
    "empirical": "--lengths empirical:inputs/examples/traces/azure.csv --rate 10 --duration 20",
    "mix": "--mix inputs/examples/mix.toml --rate 10 --duration 20",
    "priorities": "--priorities high=1,normal=8,low=1 --rate 60 --workers 2 --models 3 --duration 15",
    "sessions": "--sessions turns=5,gap=10,longest=14000 --rate 5 --duration 60",
    "overload": "--workers 2 --models 3 --rate 150 --duration 8",
    "long-queues": "--workers 2 --rate 40 --queue-threshold 2 --models 2 --duration 10",
    "many-models": "--workers 3 --models 30 --zipf 0.5 --rate 4 --duration 60",
    "keep-alive": "--keep-alive 5 --rate 2 --duration 90",
    "slots": "--slots 4 --workers 4 --rate 6 --duration 40",
    "wire": "--wire --rate 20 --duration 20",
    "wire-loss": "--wire --loss 0.05 --latency-ms 5 --rate 10 --duration 20",
    "loss": "--loss 0.1 --rate 10 --duration 30",
    "latency": "--latency-ms 50 --rate 10 --duration 30",
    "perfect-knowledge": "--report-interval 0 --rate 20 --duration 20",
    "rare-reports": "--report-interval 5 --rate 20 --duration 40",
    "warm-up": "--warmup 10 --slo-ttft 0.5 --slo-tpot 0.02 --rate 20 --duration 30",
    "threshold": "--fail-if ttft_p99>0.0001,completed<1 --duration 10",
    "refused": "--policy no_such_policy",
    "listing": "--list models",
    "random": "--policy random --rate 20 --duration 20",
    "round-robin": "--policy round_robin --rate 20 --duration 20",
    "power-of-two": "--policy power_of_two:choices=3 --workers 10 --rate 40 --duration 20",
    "least-loaded": "--policy least_loaded --rate 20 --duration 20",
    "startup-time": "--policy startup_time:sample=2,margin_s=0.1 --workers 10 --rate 40 --duration 20",
    "own-policy": "--policy tree/examples/policy.py --rate 20 --duration 20",
    "queue": "--engine queue --service-mean 0.5 --rate 8 --duration 60",
    "queue-loads": "--engine queue --service deterministic --service-load 1.5 --slots 2 --keep-alive 10 --rate 5 --duration 60",
    "queue-spread": "--engine queue --service hyperexponential:3 --slots 2 --policy random --report-interval 0 --rate 8 --duration 60",
    "vllm-v0": "--engine-profile vllm_v0 --loader safetensors --rate 10 --duration 30",
    "splitwise": "--engine-profile splitwise --loader serverlessllm --rate 10 --duration 30",
    "engine-start": "--engine-profile cuda_graphs --loader engine_start --rate 10 --duration 40",
    "catalog": "--catalog inputs/examples/catalog.toml --hardware our-box --rate 10 --duration 30",
    "mixed-fleet": "--fleet inputs/examples/fleet.toml --catalog inputs/examples/catalog.toml --rate 8 --duration 30",
    "mixed-hardware": "--hardware h100-80g:3,a5000-24g:2 --rate 10 --duration 30",
    "trace-azure": "--trace inputs/examples/traces/azure.csv",
    "trace-bailian": "--trace inputs/examples/traces/bailian.jsonl",
    "trace-burstgpt": "--trace inputs/examples/traces/burstgpt.csv --model-map inputs/examples/model-map.toml",
    "trace-mooncake": "--trace inputs/examples/traces/mooncake.jsonl",
    "trace-splitwise": "--trace inputs/examples/traces/splitwise-sim.csv",
    "trace-vidur": "--trace inputs/examples/traces/vidur.csv",
    "trace-columns": "--trace inputs/examples/traces/own.csv --columns 'arrival=start,prompt=tokens in,output=tokens out,model=llm'",
    "trace-recorded": "--trace inputs/examples/traces/recorded.jsonl --wire",
    "trace-rate": "--trace inputs/examples/traces/azure.csv --trace-rate 3",
    "bad-minute": "--faults inputs/examples/faults.toml --rate 10 --duration 60",
    "churn": "--faults inputs/scenarios/churn.toml --workers 20 --rate 20 --duration 30",
    "churn-wire": "--faults inputs/scenarios/churn.toml --wire --workers 10 --rate 10 --seed 3 --duration 30",
    "clock-jump": "--faults inputs/scenarios/clock-jump.toml --rate 10 --duration 30",
    "restart": "--faults inputs/scenarios/coordinator-restart.toml --rate 10 --duration 30",
    "flaky-network": "--faults inputs/scenarios/flaky-network.toml --wire --rate 10 --duration 30",
    "rolling-crashes": "--faults inputs/scenarios/rolling-worker-crashes.toml --rate 10 --duration 30",
    "slow-worker": "--faults inputs/scenarios/slow-worker.toml --rate 10 --duration 30",
    "split-brain": "--faults inputs/scenarios/split-brain.toml --workers 9 --rate 10 --duration 30",
    "thundering-herd": "--faults inputs/scenarios/thundering-herd.toml --workers 8 --rate 10 --duration 30",
    LIVE: "--workers 3 --models 3 --rate 5 --duration 12 --speedup 4 --seed 7",
    AZURE: "--trace inputs/azure.csv --workers 10 --duration 900",  # with --azure FILE only
}
"""Arguments of each configuration. All but the live one run in virtual time. `inputs` is a copy of the examples and scenarios, the same for both sides; `tree`
is the checkout itself, for the policy, which imports modules of the project."""

INPUTS = {"examples": "examples", "experiments/scenarios": "scenarios"}
"""Folders that are copied into the folder of inputs, and their names there."""
RESULTS, ROWS, WORKLOAD, REPORT = "results.json", "requests.csv", "workload.jsonl", "report.html"
OUTPUTS = {"--record": WORKLOAD, "--requests-csv": ROWS, "--json": RESULTS, "--html": REPORT}
"""Files by flag, in the order in which they are compared: what came, what became of each request, and figures of all of it."""
STATUS, STDOUT, STDERR = "status", "stdout", "stderr"

IN_TABLE = re.compile(r"(?<=wall time ).*? requests/s|(?<=^placement decision).*$", re.MULTILINE)
"""The parts of the closing table that depend on wall time: the duration of the run, and the row of `wall.decision_s`."""
IN_PROGRESS = re.compile(r"^.* · [\d,]+ done · [\d,]+ in flight.*\n", re.MULTILINE)
"""The lines of progress, one every five seconds of wall time."""
IN_REPORT = re.compile(r'(?<=, run in ).*? of wall time \(.*? requests/s\)|(?<=<th scope="row">placement decision</th>).*(?=</tr>)|(?<=<p>sllm )[^,<]+(?=, )')
"""The parts of the HTML report about wall time (in the subtitle, and in the row of `wall.decision_s`) and about the version."""
PARAMETERS = re.compile(r'<section class="parameters">.*?</section>', re.DOTALL)
PARAMETER = re.compile(r"<h3>(?P<group>[^<]*)</h3>|<dt>(?P<name>[^<]*)</dt><dd>(?P<value>[^<]*)</dd>")
SHOWN = 60  # characters of a line that differs


class Verdict(NamedTuple):
    """The outcome of comparing one configuration."""

    difference: str = ""  # the first difference; "": none
    file: str = ""  # the file with the difference
    told: tuple[str, ...] = ()  # settings that only one side has


# --- comparing ----------------------------------------------------------------------------------------------------------------------


def find_difference(here: Any, there: Any, at: str, alone: list[str] | None = None) -> str:
    """The first difference of two trees of atoms, lists and dicts; "" if there is none. `at`: the path of the trees. Keys that only one side has are added to
    the list `alone`, or are differences if `alone` is None."""
    if isinstance(here, dict) and isinstance(there, dict):
        lonely = [f"{at}.{key} only {side}" for side, one, other in (("here", here, there), ("there", there, here)) for key in one if key not in other]
        if lonely and alone is None:
            return lonely[0]
        if alone is not None:
            alone += lonely
        shared, shared_there = [key for key in here if key in there], [key for key in there if key in here]
        found = next((found for key in shared if (found := find_difference(here[key], there[key], f"{at}.{key}", alone))), "")
        return found or (f"{at}: keys in another order" if shared != shared_there else "")
    if isinstance(here, list) and isinstance(there, list):
        pairs = enumerate(zip(here, there, strict=False))
        found = next((found for place, (one, other) in pairs if (found := find_difference(one, other, f"{at}[{place}]", alone))), "")
        return found or (f"{at}: {len(here)} entries here, {len(there)} there" if len(here) != len(there) else "")
    if type(here) is not type(there) or here != there:  # 1 and 1.0 are not the same text
        return f"{at}: {shorten(repr(here))} here, {shorten(repr(there))} there"
    return ""


def shorten(text: str, begin: int = 0) -> str:
    """A part of a text that fits on a line."""
    return text[begin : begin + SHOWN] + ("…" if len(text) > begin + SHOWN else "")


def find_text_difference(here: str, there: str) -> str:
    """The first line in which two texts differ; "" if there is none."""
    if here == there:
        return ""
    lines, others = here.splitlines(keepends=True), there.splitlines(keepends=True)
    for number, (line, other) in enumerate(zip(lines, others, strict=False), 1):
        if line != other:
            alike = next((place for place, (one, two) in enumerate(zip(line, other, strict=False)) if one != two), min(len(line), len(other)))
            begin = max(0, alike - SHOWN // 3)
            return f"line {number}: {shorten(line, begin)!r} here, {shorten(other, begin)!r} there"
    return f"{len(lines)} lines here, {len(others)} there"


def find_results_difference(here: str, there: str, alone: list[str]) -> str:
    """The first difference of two results, without `wall` and the version. Keys of `run` that only one side has are added to `alone`."""
    one, other = (json.loads(text) for text in (here, there))
    run, other_run = (tree.pop("run", {}) for tree in (one, other))
    for tree, key in ((one, "wall"), (other, "wall"), (run, "version"), (other_run, "version")):
        tree.pop(key, None)
    return find_difference(run, other_run, "run", alone) or find_difference(one, other, "results")


def find_report_difference(here: str, there: str, alone: list[str]) -> str:
    """The first difference of two HTML reports, without wall time and version. Settings that only one report shows are added to `alone`."""
    page, other_page = (IN_REPORT.sub("", PARAMETERS.sub("", text)) for text in (here, there))
    return find_difference(dict(read_parameters(here)), dict(read_parameters(there)), "parameters", alone) or find_text_difference(page, other_page)


def read_parameters(page: str) -> Iterator[tuple[str, list[str]]]:
    """The name of each setting that an HTML report shows, with its group and its value."""
    group = ""
    for section in PARAMETERS.findall(page):
        for match in PARAMETER.finditer(section):
            if match["group"] is not None:
                group = match["group"]
            else:
                yield match["name"], [group, match["value"]]


def find_counts_difference(here: str, there: str) -> str:
    """The first difference between the numbers of requests sent and completed of two live runs."""
    counts, other_counts = ({key: json.loads(text)["requests"][key] for key in ("sent", "completed")} for text in (here, there))
    return find_difference(counts, other_counts, "requests")


def find_file_difference(name: str, here: str, there: str, alone: list[str]) -> str:
    """The first difference of one output, the name of whose file is `name`."""
    if name == RESULTS:
        return find_results_difference(here, there, alone)
    if name == REPORT:
        return find_report_difference(here, there, alone)
    if name in (STDOUT, STDERR):
        here, there = (IN_PROGRESS.sub("", IN_TABLE.sub("", text)) for text in (here, there))
    return find_text_difference(here, there)


def read(path: Path) -> str | None:
    """The text of a file with its own line ends; None if there is no such file."""
    return path.read_bytes().decode("utf-8", "backslashreplace") if path.is_file() else None


def compare(here: Path, there: Path, *, live: bool = False, expected: int = 0) -> Verdict:
    """Compare the outputs in two folders. `expected`: the exit status that both runs must have."""
    status, other_status = (read(folder / STATUS) for folder in (here, there))
    if status != other_status:
        return Verdict(f"exit status {status} here, {other_status} there", STDERR)
    if status != str(expected):
        return Verdict(f"fails, exit status {status}: {shorten((read(here / STDERR) or '').strip().rpartition(chr(10))[2])}", STDERR)
    told: list[str] = []
    for name in (RESULTS,) if live else (STDERR, *OUTPUTS.values(), STDOUT):
        one, other = read(here / name), read(there / name)
        if one is None or other is None:
            found = "" if one is other else f"written only {'there' if one is None else 'here'}"
        elif live:
            found = find_counts_difference(one, other)
        else:
            found = find_file_difference(name, one, other, told)
        if found:
            return Verdict(found, name, tuple(told))
    return Verdict(told=tuple(told))


# --- running ------------------------------------------------------------------------------------------------------------------------


def run_one(tree: Path, arguments: Sequence[str], inputs: Path, folder: Path, cache: Path) -> None:
    """Run one command of a checkout, which writes all outputs into `folder`. `cache`: the folder for bytecode, so that the checkout is not changed."""
    folder.mkdir(parents=True)
    links = {folder / "inputs": inputs, folder / "tree": tree}
    for link, target in links.items():
        link.symlink_to(target.resolve())
    outputs = [text for pair in OUTPUTS.items() for text in pair]
    environ = {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(folder), "PYTHONUTF8": "1", "PYTHONPYCACHEPREFIX": str(cache)}
    with (folder / STDOUT).open("wb") as stdout, (folder / STDERR).open("wb") as stderr:
        try:
            done = subprocess.run(
                [sys.executable, str(tree / PROGRAM), *arguments, *outputs],
                cwd=folder, env=environ, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, timeout=TIMEOUT_S, check=False,
            )  # fmt: skip
            status = str(done.returncode)
        except subprocess.TimeoutExpired:
            status = f"none: still running after {TIMEOUT_S:.0f} s"
    (folder / STATUS).write_text(status, encoding="utf-8")
    for link in links:
        link.unlink()


def gather_inputs(folder: Path, azure: str) -> None:
    """Copy the input files of the configurations into `folder`."""
    for source, name in INPUTS.items():
        shutil.copytree(ROOT / source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    if azure:
        shutil.copyfile(azure, folder / "azure.csv")


def copy_pure(tree: Path, folder: Path) -> Path:
    """A copy of a checkout without its compiled modules."""
    shutil.copytree(tree, folder, symlinks=True, ignore=shutil.ignore_patterns(".*", "*.so", "*.pyd", "__pycache__", "build"))
    return folder


class Comparison:
    """One or two checkouts, and the configurations to run. `here`: the folder for the outputs of `tree`. `there`: the folder for the outputs of `base`, another
    checkout; or the folder of saved outputs, if `base` is None; None if nothing is compared. `work`: a folder for temporary files."""

    def __init__(self, work: Path, tree: Path, here: Path, base: Path | None, there: Path | None, inputs: Path) -> None:
        self.tree = tree
        self.base = base
        self._work = work
        self._here = here
        self._there = there
        self._inputs = inputs
        self.told: Counter[str] = Counter()  # settings that only one side has, with the number of configurations that show them

    def run(self, configurations: Mapping[str, list[str]], jobs: int) -> list[str]:
        """Run all configurations in both checkouts, print a line for each as soon as it is known, and return the names of those that differ or fail."""
        wrong = []
        with ThreadPoolExecutor(jobs) as pool:
            sides = [(self.tree, self._here)] + ([(self.base, self._there)] if self.base is not None and self._there is not None else [])
            try:
                under_way = {
                    name: [pool.submit(run_one, tree, arguments, self._inputs, folder / name, self._work / "bytecode") for tree, folder in sides]
                    for name, arguments in configurations.items()
                }
                for name, futures in under_way.items():
                    for future in futures:
                        future.result()
                    if not self._judge(name, live="--virtual" not in configurations[name], width=max(map(len, configurations))):
                        wrong.append(name)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return wrong

    def _judge(self, name: str, *, live: bool, width: int) -> bool:
        """Print the outcome of a configuration; returns whether there is no difference."""
        here, there, expected = self._here / name, (self._there or self._here) / name, EXPECTED.get(name, 0)
        verdict = compare(here, there, live=live, expected=expected)
        self.told.update(set(verdict.told))
        words = "same" if self._there is not None else "saved"
        if verdict.difference:
            words = f"differs: {verdict.file}: {verdict.difference} ({here / verdict.file} {there / verdict.file})"
        print(f"{name:<{width}}  {words}", flush=True)
        return not verdict.difference


# --- command line -------------------------------------------------------------------------------------------------------------------


def table(*, azure: bool = False) -> dict[str, list[str]]:
    """The arguments of each configuration, by name. `azure`: whether there is a file for the one that needs it."""
    split = {name: shlex.split(text) for name, text in CONFIGURATIONS.items() if azure or name != AZURE}
    return {name: [*([] if name == LIVE else ["--virtual"]), *arguments] for name, arguments in split.items()}


def parse(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description="Holds the outputs of two checkouts against each other.")
    parser.add_argument("--against", metavar="TREE|DIR", type=Path, help="another checkout, or a folder made by --save")
    parser.add_argument("--pure", action="store_true", help="against a copy of the same checkout without its compiled modules")
    parser.add_argument("--save", metavar="DIR", type=Path, help="keep the outputs of --tree in this folder, which must be empty or not there")
    parser.add_argument("--tree", metavar="TREE", type=Path, default=ROOT, help="the checkout that is looked at [the one of this program]")
    parser.add_argument("--only", metavar="NAME,...", default="", help="these configurations only")
    parser.add_argument("--azure", metavar="FILE", default="", help="an Azure LLM inference trace, for the configuration of that name")
    parser.add_argument("--jobs", metavar="N", type=int, default=JOBS, help=f"commands at a time [{JOBS}]")
    parser.add_argument("--list", action="store_true", help="show the configurations and exit")
    arguments = parser.parse_args(argv)
    if arguments.list:
        return parser, arguments
    if arguments.against is not None and arguments.pure:
        parser.error("--against and --pure: give one of them")
    if arguments.against is None and not arguments.pure and arguments.save is None:
        parser.error("say what to hold this checkout against (--against or --pure), or where to keep its outputs (--save)")
    if arguments.jobs < 1:
        parser.error("--jobs must be at least 1")
    for name in ("tree", "against", "save"):
        if getattr(arguments, name) is not None:
            setattr(arguments, name, getattr(arguments, name).resolve())
    if not (arguments.tree / PROGRAM).is_file():
        parser.error(f"--tree {arguments.tree}: no checkout, for it has no {PROGRAM}")
    if arguments.pure and not any(path.suffix in (".so", ".pyd") for path in [*arguments.tree.glob("*"), *arguments.tree.glob("sllm/**/*")]):
        parser.error(f"--pure: no module of {arguments.tree} is compiled")
    if arguments.against is not None and not any((arguments.against / name).is_file() for name in (MANIFEST, PROGRAM)):
        parser.error(f"--against {arguments.against}: neither a checkout nor outputs made by --save")
    if arguments.save is not None and arguments.save.exists() and not (arguments.save.is_dir() and not any(arguments.save.iterdir())):
        parser.error(f"--save {arguments.save}: is not an empty folder")
    if arguments.azure and not Path(arguments.azure).is_file():
        parser.error(f"--azure {arguments.azure}: no such file")
    return parser, arguments


def choose(parser: argparse.ArgumentParser, only: str, configurations: dict[str, list[str]]) -> dict[str, list[str]]:
    """The configurations named by --only; all of them if it is empty."""
    names = [name for name in only.split(",") if name]
    unknown = [name for name in names if name not in configurations]
    if unknown:
        parser.error(f"--only {','.join(unknown)}: there are {', '.join(configurations)}")
    return {name: arguments for name, arguments in configurations.items() if not names or name in names}


def main(argv: Sequence[str] | None = None) -> int:
    parser, arguments = parse(argv)
    if arguments.list:
        for name, words in table(azure=True).items():
            print(f"{name:<{max(map(len, CONFIGURATIONS))}}  {shlex.join(words)}")
        return 0
    saved = arguments.against if arguments.against is not None and (arguments.against / MANIFEST).is_file() else None
    if saved is not None and arguments.azure:
        parser.error("--azure: saved outputs come with the files that their commands read")
    known = json.loads((saved / MANIFEST).read_text(encoding="utf-8"))["configurations"] if saved is not None else table(azure=bool(arguments.azure))
    chosen = choose(parser, arguments.only, known)
    began = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="identical-"))
    wrong: list[str] = []
    try:
        keep = arguments.save or work / "here"
        inputs = (arguments.save or work) / "inputs"
        if saved is None:
            gather_inputs(inputs, arguments.azure)
        else:
            shutil.copytree(saved / "inputs", inputs)
        base = copy_pure(arguments.tree, work / "pure") if arguments.pure else arguments.against if saved is None else None
        there = saved if saved is not None else work / "there" if base is not None else None
        comparison = Comparison(work, arguments.tree, keep, base, there, inputs)
        wrong = comparison.run(chosen, arguments.jobs)
        if arguments.save is not None:
            (keep / MANIFEST).write_text(json.dumps({"configurations": chosen}, indent=1) + "\n", encoding="utf-8")
    finally:
        clear(work, wrong)
    for what, times in comparison.told.items():
        print(f"{what}, in {times} of them")
    print(f"{len(chosen)} configurations, {len(wrong)} wrong, {time.monotonic() - began:.0f} s", file=sys.stderr)
    return 1 if wrong else 0


def clear(work: Path, kept: Sequence[str]) -> None:
    """Remove the outputs of all configurations but those named, which are kept for inspection."""
    if not kept:
        shutil.rmtree(work)
        return
    for path in [path for path in work.iterdir() if path.name not in ("here", "there")] + [path for path in work.glob("*here/*") if path.name not in kept]:
        shutil.rmtree(path)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
