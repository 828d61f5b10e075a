"""How fast the server is, beside what bounds it: ``make bench``. See ``serve/bench/__main__.py``."""
