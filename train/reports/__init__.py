"""What a person reads of runs: tables, a page, pictures of a generator's layers."""
