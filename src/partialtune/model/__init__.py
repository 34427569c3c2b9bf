"""Models: loading, the structure of any causal language model, and the selectors that name its parts."""
