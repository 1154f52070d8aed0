"""Traces of splitwise-sim (Patel et al., Splitwise, ISCA 2024; github.com/Mutinifni/splitwise-sim): arrivals in seconds.

Request ids in these traces are plain numbers and application ids name no model, so both are ignored.
"""

from sllm.workload.traces.base import CsvFormat


class SplitwiseSim(CsvFormat):
    """The format."""

    name = "splitwise-sim"
    about = "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,token_size"
    time_column, prompt_column, output_column = "arrival_timestamp", "prompt_size", "token_size"


FORMAT = SplitwiseSim()
