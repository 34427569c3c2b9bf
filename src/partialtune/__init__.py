"""Partial fine-tuning of causal language models with layer freezing that is planned, proved and shown."""

__version__ = "0.1.0"
