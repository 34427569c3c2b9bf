"""Which blocks and parts to train: ranked by how large their gradients are beside their weights."""
