"""How many tokens a request brings and asks for.

A sampler is a function `(rng) -> (prompt_tokens, output_tokens)`, both at least 1. `parse_lengths` makes one from what a user writes:

    azure-conv                 lognormal, fitted to the Azure LLM inference trace 2023, conversation
    fixed:PROMPT:OUTPUT        always the same
    empirical:FILE             rows of a trace file, drawn with replacement; keeps the tie between a prompt and its output
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from random import Random
from typing import NamedTuple

from sllm.errors import UsageError
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

    Without regard to the cut sigma would be sqrt(2 ln(mean / median)), and the mean of long-tailed outputs 5 % too small.
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


def empirical(path: str) -> LengthSampler:
    """Lengths of the rows of a trace file, each row as likely as any other. Holds 8 bytes for each row. UsageError as `open_trace`."""
    prompts, outputs = array("i"), array("i")
    with open_trace(path) as trace:
        for row in trace:
            prompts.append(row.prompt_tokens)
            outputs.append(row.output_tokens)
    count = len(prompts)
    if not count:
        raise UsageError(f"{path}: no requests to take lengths from")

    def sample(rng: Random) -> tuple[int, int]:
        index = int(rng.random() * count)
        return prompts[index], outputs[index]

    return sample


def parse_lengths(text: str) -> LengthSampler:
    """A sampler from its description (see the module). UsageError names the description."""
    kind, _, rest = text.partition(":")
    if kind == "azure-conv" and not rest:
        return lognormal()
    if kind == "empirical" and rest:
        return empirical(rest)
    if kind == "fixed":
        numbers = rest.split(":")
        if len(numbers) == 2 and all(n.isdecimal() and len(n) < 12 and 1 <= int(n) <= TOKENS_MAX for n in numbers):
            return fixed(int(numbers[0]), int(numbers[1]))
    raise UsageError(f"token lengths {text!r}: must be azure-conv, fixed:PROMPT:OUTPUT (tokens, 1 to {TOKENS_MAX}) or empirical:FILE")
