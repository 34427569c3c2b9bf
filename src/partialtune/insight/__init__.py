"""What training changed: ranks of weight changes, tokens that moved, probabilities that shifted, curves in bits."""
