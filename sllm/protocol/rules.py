"""Field rules: which values a field of a message may have, whichever codec packs it.

Every message declares the rule of each of its fields (`sllm.protocol.messages`). Sender and receiver use the same rule, so whatever one role may say, every
other role can repeat. Limits come from `sllm.protocol.limits`.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from sllm.protocol import limits
from sllm.protocol.limits import TEXT_MAX_BYTES


class Rule:
    """The rule of one sort of field. `what` describes the accepted values for people.

    `mend` clamps a value that was computed from a peer's message, so that the answer can always be packed. `draw` makes an accepted value, often one at a
    limit of the rule, for tests that send every valid message.
    """

    def __init__(self, what: str) -> None:
        self.what = what

    def accepts(self, value: Any) -> bool:
        """Whether the value keeps the rule. A value of a subclass is refused."""
        raise NotImplementedError

    def mend(self, value: Any) -> Any:
        """The value, clamped to the rule where clamping is possible; otherwise unchanged."""
        return value

    def draw(self, rng: Random) -> Any:
        """A value that keeps the rule."""
        raise NotImplementedError


# --- texts ------------------------------------------------------------------------------------------------------------------------------

ALPHABETS = ("a", "kM-7/. ", "\u00e9\u00df", "\ud55c\uae00", "\U0001f999", "0")
HOSTS = ("127.0.0.1", "::1%a", "h" * limits.HOST_MAX_BYTES, "no-such-host", "%%", "::")


def _draw_text(rng: Random, most_bytes: int, alphabets: tuple[str, ...]) -> str:
    size = rng.choice((1, most_bytes, rng.randint(1, most_bytes), rng.randint(1, min(most_bytes, 12))))
    text = "".join(rng.choices(rng.choice(alphabets), k=size))
    return text.encode()[:size].decode(errors="ignore") or "a"


class Name(Rule):
    """A name by `limits.name_problem`."""

    def __init__(self, most_bytes: int) -> None:
        super().__init__(f"1 to {most_bytes} bytes of printable text")
        self.most_bytes = most_bytes

    def accepts(self, value: Any) -> bool:
        return type(value) is str and not limits.name_problem(value, self.most_bytes)

    def draw(self, rng: Random) -> Any:
        return _draw_text(rng, self.most_bytes, ALPHABETS)


class Host(Rule):
    """A host by `limits.host_problem`."""

    def __init__(self, may_be_empty: bool) -> None:
        super().__init__(f"a host of at most {limits.HOST_MAX_BYTES} bytes")
        self.may_be_empty = may_be_empty

    def accepts(self, value: Any) -> bool:
        return type(value) is str and (not limits.host_problem(value) if value else self.may_be_empty)

    def draw(self, rng: Random) -> Any:
        return "" if self.may_be_empty and rng.random() < 0.3 else rng.choice(HOSTS)


class Prose(Rule):
    """Text for people; `mend` cuts a long text. Half of a surrogate pair is refused, because it can be neither printed nor packed again."""

    def __init__(self) -> None:
        super().__init__(f"at most {TEXT_MAX_BYTES} bytes of text")

    def accepts(self, value: Any) -> bool:
        try:
            return type(value) is str and len(value.encode()) <= TEXT_MAX_BYTES
        except UnicodeEncodeError:
            return False

    def mend(self, value: Any) -> Any:
        return value.encode(errors="replace")[:TEXT_MAX_BYTES].decode(errors="ignore") if type(value) is str else value

    def draw(self, rng: Random) -> Any:
        return _draw_text(rng, TEXT_MAX_BYTES, (*ALPHABETS, "\x00\n\u202e"))


class OneOf(Rule):
    """One of some texts."""

    def __init__(self, choices: tuple[str, ...]) -> None:
        super().__init__(f"one of {', '.join(choices)}")
        self.choices = choices

    def accepts(self, value: Any) -> bool:
        return type(value) is str and value in self.choices

    def draw(self, rng: Random) -> Any:
        return rng.choice(self.choices)


# --- numbers ----------------------------------------------------------------------------------------------------------------------------


class Flag(Rule):
    """True or False."""

    def __init__(self) -> None:
        super().__init__("True or False")

    def accepts(self, value: Any) -> bool:
        return type(value) is bool

    def draw(self, rng: Random) -> Any:
        return rng.random() < 0.5


class Whole(Rule):
    """A whole number, `least` <= value <= `most`; `least` is 0 or 1."""

    def __init__(self, most: int, least: int = 0) -> None:
        super().__init__(f"a whole number from {least} to {most}")
        self.least = least
        self.most = most

    def accepts(self, value: Any) -> bool:
        return type(value) is int and self.least <= value <= self.most

    def draw(self, rng: Random) -> Any:
        least, most = self.least, self.most
        return rng.choice((least, least + 1, most, rng.randint(least, most), rng.randint(least, min(most, 1000))))


class Real(Rule):
    """A float, `least` <= value <= `most`. With `cut`, `mend` turns a larger value into `most`."""

    def __init__(self, what: str, least: float, most: float, draws: tuple[float, ...], *, cut: bool = False) -> None:
        super().__init__(what)
        self.least = least
        self.most = most
        self._cut = cut
        self._draws = draws

    def accepts(self, value: Any) -> bool:
        return type(value) is float and self.least <= value <= self.most

    def mend(self, value: Any) -> Any:
        return self.most if self._cut and type(value) is float and value > self.most else value

    def draw(self, rng: Random) -> Any:
        return rng.choice((*self._draws, rng.uniform(self.least, self.most)))


# --- tuples -----------------------------------------------------------------------------------------------------------------------------


class Distinct(Rule):
    """A tuple of up to `most` different items, each of which keeps the rule `item`. Two pairs count as equal if their first parts are equal."""

    def __init__(self, item: Rule, most: int) -> None:
        super().__init__(f"a tuple of at most {most}, no two alike, each {item.what}")
        self.item = item
        self.most = most
        self._of_pairs = isinstance(item, Pair)

    def accepts(self, value: Any) -> bool:
        return type(value) is tuple and len(value) <= self.most and all(map(self.item.accepts, value)) and not self.repeats(value)

    def repeats(self, value: tuple[Any, ...]) -> bool:
        """Whether the tuple has two equal items. Its type, its length and its items have been checked before."""
        if len(value) < 2:
            return False
        return len(dict(value) if self._of_pairs else set(value)) < len(value)

    def mend(self, value: Any) -> Any:
        return tuple(map(self.item.mend, value)) if type(value) is tuple else value

    def draw(self, rng: Random) -> Any:
        size = rng.choice((0, 0, 1, 2, 3, rng.randint(0, min(self.most, 20)), rng.randint(0, min(self.most, 20)), self.most))
        items = [self.item.draw(rng) for _ in range(size)]
        return tuple(sorted(dict(items).items() if self._of_pairs else set(items)))


class Pair(Rule):
    """A tuple of two values, each with its rule."""

    def __init__(self, first: Rule, second: Rule) -> None:
        super().__init__(f"a pair: {first.what}; {second.what}")
        self.first = first
        self.second = second

    def accepts(self, value: Any) -> bool:
        return type(value) is tuple and len(value) == 2 and self.first.accepts(value[0]) and self.second.accepts(value[1])

    def mend(self, value: Any) -> Any:
        return (self.first.mend(value[0]), self.second.mend(value[1])) if type(value) is tuple and len(value) == 2 else value

    def draw(self, rng: Random) -> Any:
        return self.first.draw(rng), self.second.draw(rng)


class Fields(Rule):
    """A record inside a message: `kind` makes the record of its fields, and each field has its rule. Codecs see the tuple of the fields."""

    def __init__(self, kind: Callable[..., Any], rules: dict[str, Rule]) -> None:
        super().__init__(f"a tuple of {', '.join(rules)}")
        self.kind = kind
        self.names = tuple(rules)
        self.rules = tuple(rules.values())

    def accepts(self, value: Any) -> bool:
        return type(value) is tuple and len(value) == len(self.rules) and all(rule.accepts(item) for rule, item in zip(self.rules, value, strict=True))

    def mend(self, value: Any) -> Any:
        if type(value) is not tuple or len(value) != len(self.rules):
            return value
        return tuple([rule.mend(item) for rule, item in zip(self.rules, value, strict=True)])

    def draw(self, rng: Random) -> Any:
        return tuple([rule.draw(rng) for rule in self.rules])


# --- the rules that fields keep -----------------------------------------------------------------------------------------------------------

NAME = Name(limits.NAME_MAX_BYTES)
ID = Name(limits.ID_MAX_BYTES)
HOST = Host(may_be_empty=False)
HOST_OR_NONE = Host(may_be_empty=True)
PORT = Whole((1 << 16) - 1)
PROSE = Prose()
FLAG = Flag()
COUNT = Whole(limits.NUMBER_MAX)
TOKENS = Whole(limits.TOKENS_MAX)
TOKENS_LEAST_ONE = Whole(limits.TOKENS_MAX, 1)
REQUESTS = Whole(limits.SLOTS_MAX + limits.QUEUE_MAX)
SLOTS = Whole(limits.SLOTS_MAX, 1)
RUNNING = Whole(limits.SLOTS_MAX)
PRIORITY = Whole(9)
ATTEMPT = Whole(limits.PLACEMENTS_MAX)
SECONDS = Real("a float of seconds from 0 to 1e9", 0.0, limits.SECONDS_MAX, (0.0, limits.SECONDS_MAX, 5e-324, 1.0, 0.01), cut=True)
PART = Real("a float from 0 to 1", 0.0, 1.000001, (0.0, 1.0, 0.5))
INTERVAL = Real(
    f"a float of seconds above 0 and at most {limits.REPORT_INTERVAL_MAX_S:.12g}", 5e-324, limits.REPORT_INTERVAL_MAX_S,
    (5e-324, limits.REPORT_INTERVAL_MAX_S, 1e-6, 0.1, 1.0),
)  # fmt: skip
NAMES = Distinct(NAME, limits.NAMES_MAX)
NAMED_SECONDS = Distinct(Pair(NAME, SECONDS), limits.NAMES_MAX)
EXCLUDED = Distinct(ID, limits.PLACEMENTS_MAX)
MISSING = Distinct(COUNT, limits.MISSING_MAX)
