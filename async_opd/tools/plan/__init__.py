"""The needs of a run, before anything starts: memory of every role, places on nodes, what keeps up
with what."""
