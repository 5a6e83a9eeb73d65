"""Rollouts: prompts, and generators on vLLM whose weights are replaced in flight."""
