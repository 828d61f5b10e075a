"""Reports on runs: tables, a page, pictures of a generator's layers."""
