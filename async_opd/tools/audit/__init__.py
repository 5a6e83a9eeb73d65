"""Proof from a run's ledger that no prompt was lost and none trained twice in the state the run has
reached, and that the lags it has written are those of its tokens."""
