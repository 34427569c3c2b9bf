"""Proof: digests, deltas, the audit of a run, and the comparison of two checkpoints."""
