"""How a run is shown: progress while it goes on, then a table, JSON, CSV and HTML."""
