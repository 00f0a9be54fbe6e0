"""Figures, tables and the report, from result files only.

- ``plots.figures``: every figure by name, each a function over loaded runs in one of the modules beside it;
- ``plots.report``: one self-contained HTML page of any runs;
- ``plots.tables``, ``plots.clients``: the comparison of methods, paired differences and clients, as numbers;
- ``plots.style``: what all figures share, and :func:`plots.style.save`.

Functions and their modules may have the same names, so nothing is re-exported here; importing ``plots`` alone is free.
"""
