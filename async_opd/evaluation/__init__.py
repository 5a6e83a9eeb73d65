"""Accuracy on held-out problems: of a model by itself, and before, beside and after training."""
