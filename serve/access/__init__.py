"""Who may come in, how, and how much of it: TLS, bearer tokens, limits per caller."""
