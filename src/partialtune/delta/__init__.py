"""Delta checkpoints: only what was trained, with digests of the base and of the result; and the model made of them."""
