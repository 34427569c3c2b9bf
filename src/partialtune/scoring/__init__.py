"""Scores of a model on texts and prompts, before and after."""
