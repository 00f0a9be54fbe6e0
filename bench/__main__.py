"""``python -m bench``: see :mod:`bench.overhead`."""

from bench.overhead import main

main()
