"""The learner: packing, forward, objective, the one reduction, DeepSpeed, checkpoints and the
weights' way out."""
