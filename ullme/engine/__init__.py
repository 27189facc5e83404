"""The training step: GradCache, the objective, likelihood scoring, references. PyTorch only."""
