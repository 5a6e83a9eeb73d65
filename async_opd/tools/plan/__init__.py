"""What a run would need, before anything starts: memory of every role, places on nodes, what keeps
up with what."""
