"""Benchmarks: ratios within one run on one machine, never absolute claims."""
