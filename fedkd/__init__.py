"""fedkd: a federated personalized-distillation simulator on Flower.

This package is what both sides of the network share: configuration, data, models, the typed payloads, the
contracts of the methods and the result files.  The server halves live in ``strategies``, the client halves in
``clients``, launching in ``sims`` and figures in ``plots``.
"""

__version__ = "0.1.0"
