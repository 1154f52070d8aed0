"""Placement: one file for each policy, `base` for what they share, `registry` to find them by name."""
