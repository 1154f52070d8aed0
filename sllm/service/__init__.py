"""What a worker is made of: its jobs over an engine, and its reporter."""
