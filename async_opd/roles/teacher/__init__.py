"""Teachers: score every response token of a rollout."""
