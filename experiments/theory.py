"""Exact values to compare the simulator with: queues, load balancing, caches, batching. Pure functions; the mean service time is 1 unless it is a parameter."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import exp, gamma, pi, sqrt

Matrix = list[list[float]]


# --- queues -------------------------------------------------------------------------------------------------------------------------


def mmc_wait(servers: int, rho: float) -> float:
    """Mean wait of M/M/c (Erlang C), the blocking probability worked out server by server."""
    offered = servers * rho
    blocking = 1.0
    for k in range(1, servers + 1):
        blocking = offered * blocking / (k + offered * blocking)
    return blocking / (1.0 - rho * (1.0 - blocking)) / (servers - offered)


def mg1_wait(rho: float, cv: float) -> float:
    """Mean wait of M/G/1 with that coefficient of variation of service (Pollaczek and Khinchine)."""
    return rho * (1.0 + cv * cv) / (2.0 * (1.0 - rho))


def keep_alive(rate: float, keep_s: float, load_s: float) -> tuple[float, float]:
    """(mean wait, part of requests that find the model gone) of M/M/1 whose server forgets its model `keep_s` after it fell idle, then loads for `load_s`."""
    gone = exp(-rate * keep_s)
    setup = 1.0 + rate * gone * load_s
    wait = mg1_wait(rate, 1.0) + gone * (2.0 * load_s + rate * load_s * load_s) / (2.0 * setup)
    return wait, gone * (1.0 - rate) / setup


# --- load balancing -----------------------------------------------------------------------------------------------------------------


def solve(matrix: Matrix, right: Matrix) -> Matrix:
    """X with matrix X = right, by elimination with pivots."""
    size = len(matrix)
    rows = [list(row) + list(other) for row, other in zip(matrix, right, strict=True)]
    for k in range(size):
        best = max(range(k, size), key=lambda i: abs(rows[i][k]))
        rows[k], rows[best] = rows[best], rows[k]
        pivot = rows[k][k]
        rows[k] = [value / pivot for value in rows[k]]
        for i in range(size):
            factor = rows[i][k]
            if i != k and factor:
                rows[i] = [a - factor * b for a, b in zip(rows[i], rows[k], strict=True)]
    return [row[size:] for row in rows]


def _transposed(matrix: Matrix) -> Matrix:
    return [list(column) for column in zip(*matrix, strict=True)]


def _product(a: Matrix, b: Matrix) -> Matrix:
    columns = _transposed(b)
    return [[sum(x * y for x, y in zip(row, column, strict=True)) for column in columns] for row in a]


def jsq2_wait(rho: float, requests_max: int = 240, difference_max: int = 30) -> float:
    """Mean wait when each request joins the shorter of two queues: the stationary law of the Markov chain, level by level of the number of requests.

    The chain is cut off at a number of requests and a difference of the queues beyond which almost no probability is left (rho^240 and less).
    """
    rate = 2.0 * rho

    def differences(level: int) -> list[int]:
        return list(range(level % 2, min(level, difference_max) + 1, 2))

    def move(level: int, step: int) -> Matrix:
        """Rates from a level to the one above (arrivals) or below (ends of service)."""
        place = {d: i for i, d in enumerate(differences(level + step))}
        matrix = [[0.0] * len(place) for _ in differences(level)]
        for i, d in enumerate(differences(level)):
            if step > 0:
                matrix[i][place[abs(d - 1)]] += rate  # to the shorter queue
            else:
                matrix[i][place[abs(d - 1)]] += 1.0  # from the longer one
                if level > d and d + 1 in place:
                    matrix[i][place[d + 1]] += 1.0  # from the shorter one, if it is not empty
        return matrix

    ratios: list[Matrix] = []  # law of a level = law of the level below, times the level's ratio
    back: Matrix | None = None
    for level in range(requests_max, 0, -1):
        size = len(differences(level))
        out = [sum(row) + (rate if level < requests_max else 0.0) for row in move(level, -1)]
        away = [[(out[i] if i == j else 0.0) - (back[i][j] if back else 0.0) for j in range(size)] for i in range(size)]
        ratio = _transposed(solve(_transposed(away), _transposed(move(level - 1, +1))))
        ratios.append(ratio)
        back = _product(ratio, move(level, -1)) if level > 1 else None
    law: Matrix = [[1.0]]
    total, requests = 1.0, 0.0
    for level, ratio in enumerate(reversed(ratios), 1):
        law = _product(law, ratio)
        total += sum(law[0])
        requests += level * sum(law[0])
    return requests / total / rate - 1.0


def two_choices_time(rho: float, servers: float, depth: int = 10) -> float:
    """Mean time in the system when each request joins the shorter of two different queues drawn at random.

    The limit of many servers (Vvedenskaya, Dobrushin, Karpelevich 1996; Mitzenmacher 2001) plus the term in 1/servers of the refined mean field
    (Gast and Van Houdt, 2017): the drift's curvature times the covariance of the fluctuations, and what drawing without replacement changes.
    """
    x: list[float] = [rho ** (2.0**k - 1.0) for k in range(depth + 2)]  # part of the servers with k requests or more, in the limit
    drift = [[0.0] * depth for _ in range(depth)]
    for k in range(1, depth + 1):
        drift[k - 1][k - 1] = -2.0 * rho * x[k] - 1.0
        if k > 1:
            drift[k - 1][k - 2] = 2.0 * rho * x[k - 1]
        if k < depth:
            drift[k - 1][k] = 1.0
    equations = [[0.0] * depth**2 for _ in range(depth**2)]  # drift W + W drift' + noise = 0
    for i in range(depth):
        for j in range(depth):
            for k in range(depth):
                equations[i * depth + j][k * depth + j] += drift[i][k]
                equations[i * depth + j][i * depth + k] += drift[j][k]
    noise = [[-2.0 * (x[i + 1] - x[i + 2]) if i == j else 0.0] for i in range(depth) for j in range(depth)]
    covariance = solve(equations, noise)
    variance = [0.0] + [covariance[i * depth + i][0] for i in range(depth)]
    spread = [x[k] * (1.0 - x[k]) for k in range(depth + 1)]
    curvature = [[-rho * (variance[k - 1] - variance[k]) + rho * (spread[k - 1] - spread[k])] for k in range(1, depth + 1)]
    correction = sum(row[0] for row in solve(drift, curvature))
    return (sum(x[1:]) + correction / servers) / rho


def stale_two_choices_time(rho: float, interval: float, depth: int = 45) -> float:
    """Mean time in the system for two choices among many servers, loads known only as each reported them last, every `interval`, at phases of their own.

    (Mitzenmacher, "How useful is old information?", 2000, individual updates.) A server that reported i gets requests at rate rho * (Q[i] + Q[i + 1]) until
    its next report, Q being the tail of what is on the board; the board's law is the fixed point.
    """
    board = [(1.0 - rho) * rho**i for i in range(depth)]
    queue = before = -1.0
    while abs(queue - before) > 1e-7 or before < 0.0:
        tail = [0.0] * (depth + 1)
        for i in reversed(range(depth)):
            tail[i] = tail[i + 1] + board[i]
        before, queue = queue, 0.0
        following = [0.0] * depth
        for i, part in enumerate(board):
            if part > 1e-12:
                law, load = _mm1_after(i, rho * (tail[i] + tail[i + 1]), interval, depth)
                queue += part * load
                following = [a + part * b for a, b in zip(following, law, strict=True)]
        board = [(a + b) / 2.0 for a, b in zip(board, following, strict=True)]
    return queue / rho


def _mm1_after(start: int, rate: float, time: float, depth: int) -> tuple[list[float], float]:
    """Law of the number in M/M/1 after `time`, and its mean over that time, by uniformisation."""
    jumps = 1.0 + rate
    law = [0.0] * depth
    law[start] = 1.0
    weight = exp(-jumps * time)  # that of `count` jumps
    left, count, mean = 1.0, 0, 0.0
    after = [0.0] * depth
    while left > 1e-12:
        left -= weight
        after = [a + weight * p for a, p in zip(after, law, strict=True)]
        mean += max(left, 0.0) / jumps / time * sum(i * p for i, p in enumerate(law))
        up, down = rate / jumps, 1.0 / jumps
        moved = [down * (law[0] + law[1])]
        moved += [up * law[i - 1] + down * law[i + 1] for i in range(1, depth - 1)]
        moved.append(up * (law[-2] + law[-1]))
        law = moved
        count += 1
        weight *= jumps * time / count
    return after, mean


# --- caches -------------------------------------------------------------------------------------------------------------------------


def zipf(models: int, exponent: float) -> list[float]:
    """Popularity by rank."""
    weights = [(rank + 1.0) ** -exponent for rank in range(models)]
    total = sum(weights)
    return [weight / total for weight in weights]


def che_hit_ratio(popularity: Sequence[float], room: int) -> float:
    """Che's approximation of the hit ratio of LRU: a model stays for the same time T after each use, and the mean number of models that stay is `room`."""
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2.0
        if sum(1.0 - exp(-p * middle) for p in popularity) < room:
            low = middle
        else:
            high = middle
    return sum(p * (1.0 - exp(-p * low)) for p in popularity)


def lru_hit_ratio(popularity: Sequence[float], room: int, steps: int = 240) -> float:
    """The exact hit ratio of LRU under independent draws: a use is a hit if fewer than `room` other models were used since the last one of this model.

    With draws at the times of a Poisson process of rate 1, the models used within t are independent, so their number has a law that is built up model by
    model; integrated over t on a logarithmic grid (trapezia, which converge very fast for such an integrand).
    """
    low, high = -18.0, 12.0  # of ln t: the part of the integral beyond is below 1e-8
    width = (high - low) / steps
    total = 0.0
    for step in range(steps + 1):
        t = exp(low + step * width)
        absent = [exp(-p * t) for p in popularity]
        for i, p in enumerate(popularity):
            density = p * absent[i] * t * width
            if density > 1e-13:
                total += p * density * _at_most(room - 1, absent[:i] + absent[i + 1 :])
    return total


def _at_most(count: int, absent: Sequence[float]) -> float:
    """Probability that at most `count` of several independent events happen, given for each event the probability that it does not happen."""
    law = [1.0] + [0.0] * count
    for none in absent:
        some = 1.0 - none
        for k in range(count, 0, -1):
            law[k] = law[k] * none + law[k - 1] * some
        law[0] *= none
    return sum(law)


# --- continuous batching --------------------------------------------------------------------------------------------------------------


def batching_limit(alpha_s: float, beta_s: float, gamma_s: float, prompt: int, output: int, slots: float) -> float:
    """Requests a second that an engine with `slots` full slots serves, step = alpha + beta * (sequences that decode) + gamma * (prompt tokens).

    A request keeps a slot for `output` steps (the first is its prefill), so slots / output requests end in a step:
    rate * (alpha * output / slots + beta * (output - 1) + gamma * prompt) = 1. Without end of slots this is the familiar
    1 / (output * beta + prompt * gamma), but for the one token that the prefill yields.
    """
    return 1.0 / (alpha_s * output / slots + beta_s * (output - 1) + gamma_s * prompt)


# --- intervals ------------------------------------------------------------------------------------------------------------------------


@cache
def student_t(freedom: int, confidence: float = 0.95) -> float:
    """The two-sided quantile t of Student's distribution: the interval from -t to t has the probability `confidence`."""
    factor = gamma((freedom + 1) / 2.0) / (sqrt(freedom * pi) * gamma(freedom / 2.0))

    def inside(limit: float, steps: int = 400) -> float:
        """Simpson's rule over 0..limit, twice."""
        width = limit / steps
        values: list[float] = [(1.0 + (k * width) ** 2 / freedom) ** (-(freedom + 1) / 2.0) for k in range(steps + 1)]
        return 2.0 * factor * width / 3.0 * (values[0] + values[-1] + 4.0 * sum(values[1:-1:2]) + 2.0 * sum(values[2:-1:2]))

    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2.0
        low, high = (middle, high) if inside(middle) < confidence else (low, middle)
    return low


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """(mean, half width) of the confidence interval for the mean of independent values."""
    count = len(values)
    mean = sum(values) / count
    deviation = sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    return mean, student_t(count - 1, confidence) * deviation / sqrt(count)
