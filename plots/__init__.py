"""Figures and tables, from result files only.

- ``plots.convergence``, ``plots.fairness``, ``plots.partition``: functions over loaded runs that return a figure;
- ``plots.tables``: the comparison of methods and paired differences, as numbers;
- ``plots.style``: what all figures share, and :func:`plots.style.save`.

Functions and their modules have the same names, so nothing is re-exported here; importing ``plots`` alone is free.
"""
