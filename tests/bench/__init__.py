"""How fast the server is, beside what bounds it: ``make bench``. See ``tests/bench/__main__.py``."""
