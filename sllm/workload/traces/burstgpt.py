"""BurstGPT (Wang et al., arXiv 2401.17644; github.com/HPMLL/BurstGPT): campus use of ChatGPT and GPT-4, in seconds.

Files have six columns, or eight since the second release of BurstGPT. Models are ChatGPT and GPT-4. Failed requests have no response tokens.
"""

from sllm.workload.traces.base import CsvFormat


class BurstGpt(CsvFormat):
    """The format."""

    name = "burstgpt"
    about = "Timestamp,[Session ID,Elapsed time,]Model,Request tokens,Response tokens,Total tokens,Log Type"
    time_column, prompt_column, output_column = "Timestamp", "Request tokens", "Response tokens"


FORMAT = BurstGpt()
