"""Benchmarks: alternating runs, one machine-readable row per measurement, tables drawn from the rows."""
