"""Asynchronous on-policy distillation of language models on Ray, vLLM and DeepSpeed."""
