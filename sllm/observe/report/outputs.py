"""All output files of a run, opened together before the run starts: either all are written, or none is left behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import BinaryIO, cast

from sllm.observe.report.csv import RequestsCsv
from sllm.observe.report.files import OutputFile, check_distinct
from sllm.workload import RecordedWriter

JSON, REQUESTS_CSV, HTML, RECORD = FLAGS = ("--json", "--requests-csv", "--html", "--record")


class Outputs:
    """A context manager: outputs not committed at its end are discarded. UsageError if an output cannot be opened, or is the same file as another."""

    def __init__(self, paths: Mapping[str, str], inputs: Mapping[str, str]) -> None:
        """`paths`: paths by flag; "" or missing: no output, "-": stdout. `inputs`: the files that the run reads, by flag."""
        check_distinct(paths, inputs)
        self._opened = ExitStack()
        self._files: dict[str, OutputFile] = {}
        self.requests_csv: RequestsCsv | None = None
        self.recording: RecordedWriter | None = None
        with ExitStack() as failed:
            failed.callback(self._opened.close)
            for flag in FLAGS:
                if paths.get(flag):
                    self._open(flag, paths[flag])
            failed.pop_all()

    def _open(self, flag: str, path: str) -> None:
        if flag == REQUESTS_CSV:
            self.requests_csv = RequestsCsv(path, flag)
            self._opened.callback(self.requests_csv.discard)
            return
        output = self._files[flag] = OutputFile(flag, path)
        self._opened.callback(output.discard)
        if flag == RECORD:
            self.recording = RecordedWriter(path, cast(BinaryIO, output.raw))

    def finish(self, render: Mapping[str, Callable[[], str]]) -> list[Callable[[], None]]:
        """One function per output, which writes the text that `render` makes for the output's flag, if any, and commits the file. Each function raises
        OutputError if the output could not be written."""
        steps: list[Callable[[], None]] = []
        if self.requests_csv is not None:
            steps.append(self.requests_csv.close)
        steps += [partial(self._commit, output, render.get(flag)) for flag, output in self._files.items()]
        return steps

    def _commit(self, output: OutputFile, render: Callable[[], str] | None) -> None:
        if render is not None:
            output.write(render())
        elif self.recording is not None:
            self.recording.close()
        output.commit()

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._opened.close()
