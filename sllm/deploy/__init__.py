"""Running a role as a process of its own: signals, logs, HTTP, keys."""
