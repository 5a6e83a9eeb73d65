"""Sizes of what is read at once."""

# Of the vocabulary; with some hundred rows the block stays in a CPU's cache over all its passes.
BLOCK_IDS = 4096
