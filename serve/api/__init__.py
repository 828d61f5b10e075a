"""The transports' contracts: each parses a request, asks the core and encodes the answer."""
