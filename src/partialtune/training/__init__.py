"""Training: the Trainer, its callbacks, and checkpoints."""
