"""The general servers, each serving the same graph: ``make bench-peers``. See ``tests/bench/peers/__main__.py``."""
