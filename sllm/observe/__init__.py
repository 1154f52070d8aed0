"""Turns events into figures, logs, metrics and pages."""
