"""The proof of a run: its start, how far each weight moved, the audit, and the saved files read back."""
