"""Azure LLM inference traces, 2023 and 2024 (github.com/Azure/AzurePublicDataset; Patel et al., Splitwise, ISCA 2024).

`TIMESTAMP,ContextTokens,GeneratedTokens`. The files of 2023 have times with 7 digits of a second and no time zone, the files of 2024 with 6 digits and +00:00.
Converted files have times in other forms of ISO 8601, all of which are read if they include seconds; a time without a zone is UTC.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import date

from sllm.workload.traces.base import CsvFormat

_DAY = r"(\d{4})(-?)(\d\d)\2(\d\d)"
_TIME = r"(\d\d)(:?)(\d\d)\6(\d\d(?:[.,]\d+)?)"
_ZONE = r" ?(?:Z|UTC|([+-])(\d\d)(?::?(\d\d))?)"
_FORM = re.compile(rf"{_DAY}[ T]{_TIME}(?:{_ZONE})?", re.ASCII | re.IGNORECASE)


def parse_timestamp(text: str) -> tuple[int, int, float]:
    """(day of the calendar, minutes of that day in UTC, seconds of that minute). ValueError if `text` is no time of ISO 8601 with seconds."""
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise ValueError(text)
    year, _, month, day, hour, _, minute, second_text, sign, zone_hour, zone_minute = match.groups(default="0")
    second = float(second_text.replace(",", "."))
    if int(hour) > 23 or int(minute) > 59 or second >= 60 or int(zone_hour) > 23 or int(zone_minute) > 59:
        raise ValueError(text)
    offset = (int(zone_hour) * 60 + int(zone_minute)) * (-1 if sign == "-" else 1)
    return date(int(year), int(month), int(day)).toordinal(), int(hour) * 60 + int(minute) - offset, second


class Azure(CsvFormat):
    """The format."""

    name = "azure"
    about = "TIMESTAMP,ContextTokens,GeneratedTokens"
    time_column, prompt_column, output_column = "TIMESTAMP", "ContextTokens", "GeneratedTokens"
    time_form = "a date and time (YYYY-MM-DD hh:mm:ss.fffffff, with or without a time zone)"

    def clock(self) -> Callable[[str], float]:
        """Seconds since the midnight before the first row: small numbers, so that a float keeps at least 7 digits of a second."""
        first_day: int | None = None
        minute_text, minute_s = "", 0.0

        def seconds(text: str) -> float:
            nonlocal first_day, minute_text, minute_s
            text = text.strip()
            # Neighbouring rows mostly have the same date, hour and minute, so that only the seconds have to be parsed.
            second_text = text[17:]
            if text[:17] == minute_text and second_text[2:3] == "." and second_text[3:].isdecimal() and "00" <= second_text < "60":
                return minute_s + float(second_text)
            day, minutes, second = parse_timestamp(text)
            if first_day is None:
                first_day = day
            base = (day - first_day) * 86400.0 + minutes * 60.0
            if second_text[2:3] == "." and second_text[3:].isdecimal():  # the form of the files of 2023: no time zone after the seconds
                minute_text, minute_s = text[:17], base
            return base + second

        return seconds


FORMAT = Azure()
