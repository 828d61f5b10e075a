"""The general servers, each serving the same graph: ``make bench-peers``. See ``serve/bench/peers/__main__.py``."""
