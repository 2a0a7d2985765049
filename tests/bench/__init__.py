"""Benchmarks: meshnet beside a named peer, in the same run (``python -m tests.bench --help``)."""
