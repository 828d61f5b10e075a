"""Settings, and what settles them: the command line, the machine's cores, the release."""
