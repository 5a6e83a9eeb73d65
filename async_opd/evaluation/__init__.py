"""avg@k, pass@k and maj@k of one model: their estimates, the result, and the run that makes it."""
