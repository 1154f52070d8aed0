"""The outputs of a run for its user: progress while the run goes on, then a table, JSON, CSV and HTML."""
