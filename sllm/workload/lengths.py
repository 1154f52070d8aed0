"""Laws of the numbers of prompt and output tokens of a request.

A sampler is a function `(rng) -> (prompt_tokens, output_tokens)`, both at least 1. `parse_lengths` makes a sampler from a user's description, one of LENGTHS.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from random import Random
from typing import NamedTuple

from sllm.protocol.errors import UsageError
from sllm.workload.traces import TOKENS_MAX, open_trace

LengthSampler = Callable[[Random], tuple[int, int]]


class Lognormal(NamedTuple):
    """exp(normal(mu, sigma)), cut to 1..maximum."""

    mu: float
    sigma: float
    maximum: int


def _normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2.0))


def clamped_mean(law: Lognormal) -> float:
    """Mean of min(X, maximum): the partial expectation of a lognormal below the cut, plus the cut times the mass above it."""
    mu, sigma, maximum = law
    z = (math.log(maximum) - mu) / sigma
    return math.exp(mu + sigma * sigma / 2) * _normal_cdf(z - sigma) + maximum * _normal_cdf(-z)


def fit_lognormal(mean: float, median: float, maximum: int) -> Lognormal:
    """The lognormal with this median whose mean, after the cut at `maximum`, is `mean`; found by bisection on sigma.

    The sigma of an uncut lognormal, sqrt(2 ln(mean / median)), would make the mean of long-tailed outputs 5 % too small.
    ValueError if no sigma up to 4 gives that mean.
    """
    mu = math.log(median)
    low, high = 1e-6, 4.0
    if not clamped_mean(Lognormal(mu, low, maximum)) <= mean <= clamped_mean(Lognormal(mu, high, maximum)):
        raise ValueError(f"no lognormal of median {median} cut at {maximum} has the mean {mean}")
    for _ in range(60):
        middle = (low + high) / 2
        if clamped_mean(Lognormal(mu, middle, maximum)) < mean:
            low = middle
        else:
            high = middle
    return Lognormal(mu, (low + high) / 2, maximum)


# Azure LLM inference trace 2023, conversation, 19,366 requests (Patel et al., Splitwise, ISCA 2024): mean, median and largest of each.
AZURE_CONV_PROMPT = fit_lognormal(mean=1154.7, median=1020, maximum=14050)
AZURE_CONV_OUTPUT = fit_lognormal(mean=211.1, median=129, maximum=1000)


def lognormal(prompt: Lognormal = AZURE_CONV_PROMPT, output: Lognormal = AZURE_CONV_OUTPUT) -> LengthSampler:
    """Prompt and output drawn independently of each other."""

    def sample(rng: Random) -> tuple[int, int]:
        gauss = rng.gauss
        return (
            max(1, min(prompt.maximum, round(math.exp(gauss(prompt.mu, prompt.sigma))))),
            max(1, min(output.maximum, round(math.exp(gauss(output.mu, output.sigma))))),
        )

    return sample


def fixed(prompt_tokens: int, output_tokens: int) -> LengthSampler:
    """Always the same lengths."""
    pair = (prompt_tokens, output_tokens)
    return lambda rng: pair


class Lengths(NamedTuple):
    """A law of lengths, and the means of what it draws."""

    draw: LengthSampler
    prompt_mean: float
    output_mean: float


def empirical(path: str, columns: str = "") -> Lengths:
    """Lengths of the rows of a trace file, all rows equally likely. Needs 8 bytes of memory per row. UsageError as `open_trace`."""
    prompts, outputs = array("i"), array("i")
    with open_trace(path, columns) as trace:
        for row in trace:
            prompts.append(row.prompt_tokens)
            outputs.append(row.output_tokens)
    count = len(prompts)
    if not count:
        raise UsageError(f"{path}: no requests to take lengths from")

    def sample(rng: Random) -> tuple[int, int]:
        index = int(rng.random() * count)
        return prompts[index], outputs[index]

    return Lengths(sample, sum(prompts) / count, sum(outputs) / count)


def _azure_conv(rest: str, columns: str) -> Lengths:
    if rest:
        raise ValueError(rest)
    return Lengths(lognormal(), clamped_mean(AZURE_CONV_PROMPT), clamped_mean(AZURE_CONV_OUTPUT))


def _fixed(rest: str, columns: str) -> Lengths:
    prompt, output = (_tokens(text) for text in rest.replace(":", ",").split(","))
    return Lengths(fixed(prompt, output), prompt, output)


def _lognormal(rest: str, columns: str) -> Lengths:
    numbers = [float(text) for text in rest.split(",")]
    if len(numbers) not in (4, 5) or not all(1 <= number <= TOKENS_MAX for number in numbers):
        raise ValueError(rest)
    maximum = _tokens(rest.split(",")[4]) if len(numbers) == 5 else TOKENS_MAX
    prompt, output = (fit_lognormal(mean, median, maximum) for median, mean in (numbers[:2], numbers[2:4]))
    return Lengths(lognormal(prompt, output), clamped_mean(prompt), clamped_mean(output))


def _empirical(rest: str, columns: str) -> Lengths:
    if not rest:
        raise ValueError(rest)
    return empirical(rest, columns)


def _tokens(text: str) -> int:
    text = text.strip()
    if not (text.isascii() and text.isdigit() and len(text) < 12 and 1 <= int(text) <= TOKENS_MAX):
        raise ValueError(text)
    return int(text)


class LengthLaw(NamedTuple):
    """A law of lengths that users can choose by name."""

    form: str  # of the text after the name
    meaning: str
    make: Callable[[str, str], Lengths]  # (text after the name, columns of a trace file) -> Lengths; ValueError if the text does not fit


LENGTHS: dict[str, LengthLaw] = {
    "azure-conv": LengthLaw("", "lognormal, fitted to the Azure LLM inference trace 2023, conversation", _azure_conv),
    "fixed": LengthLaw(":IN,OUT", "always the same", _fixed),
    "lognormal": LengthLaw(":MEDIAN_IN,MEAN_IN,MEDIAN_OUT,MEAN_OUT[,MOST]", "lognormal, cut at MOST tokens; prompt and output are independent", _lognormal),
    "empirical": LengthLaw(":FILE", "rows of a trace file, drawn with replacement, each prompt with its own output", _empirical),
}
"""Laws of lengths by the name that users choose them with."""


def parse_lengths(text: str, columns: str = "") -> Lengths:
    """The law that `text` describes, one of LENGTHS; `columns` as in `open_trace`, for empirical lengths. UsageError names the description."""
    kind, _, rest = text.partition(":")
    law = LENGTHS.get(kind)
    try:
        if law is None:
            raise ValueError(kind)
        return law.make(rest, columns)
    except ValueError as error:
        why = f": {error}" if str(error).startswith("no lognormal") else ""
        forms = ", ".join(f"{name}{law.form}" for name, law in LENGTHS.items())
        raise UsageError(f"token lengths {text!r}{why}: must be one of {forms} (tokens, 1 to {TOKENS_MAX})") from None


def empirical_file(text: str) -> str:
    """The trace file in a description of empirical lengths; "" for other laws."""
    kind, _, rest = text.partition(":")
    return rest if kind == "empirical" else ""
