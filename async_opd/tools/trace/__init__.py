"""The spans of a run as a trace that Perfetto shows."""
