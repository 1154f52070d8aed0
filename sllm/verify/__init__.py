"""Checkers of invariants, one file for each subject."""
