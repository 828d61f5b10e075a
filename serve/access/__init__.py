"""Authentication and limits: TLS, bearer tokens, limits per caller, the memory of calls."""
