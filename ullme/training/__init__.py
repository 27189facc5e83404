"""Training with Lightning: the module, resuming, signals."""
