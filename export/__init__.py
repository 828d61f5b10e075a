"""Turn finished training runs into bundles that can be served. Start it with ``python -m export``."""
