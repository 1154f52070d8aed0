"""Vidur's request traces (Agrawal et al., MLSys 2024; github.com/microsoft/vidur): arrivals in seconds."""

from sllm.workload.traces.base import CsvFormat


class Vidur(CsvFormat):
    """The format."""

    name = "vidur"
    about = "arrived_at,num_prefill_tokens,num_decode_tokens"
    time_column, prompt_column, output_column = "arrived_at", "num_prefill_tokens", "num_decode_tokens"


FORMAT = Vidur()
