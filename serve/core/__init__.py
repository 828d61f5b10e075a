"""One request in, one answer out: finds the model, checks, admits, runs, counts. Knows no transport."""
