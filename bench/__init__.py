"""Benchmarks, one per file; see README.md."""
