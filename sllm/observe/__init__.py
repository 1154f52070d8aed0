"""From events to figures and pictures."""
