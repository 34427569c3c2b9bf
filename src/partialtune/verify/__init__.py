"""Two checkpoints -> what moved between them, and whether only what may move did."""
