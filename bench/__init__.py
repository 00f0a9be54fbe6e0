"""Benchmarks: how fast fedkd is, and beside what.  Ratios within one run on one machine, never absolute claims.

``python -m bench [QUESTION ...]`` answers one question per file: ``overhead`` and ``pfl`` (how far from the bare
training loop), ``flower`` (beside a plain Flower app), ``scaling`` (nodes, clients, memory), ``groups`` (clients that
are trained at once), ``methods`` (where a round's time goes), ``server`` (FedGen's and FedFTG's training there) and
``startup``.  :mod:`bench.hostile` is no benchmark but a demonstration.
"""
