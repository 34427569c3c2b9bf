"""What a person reads of a run: figures, report, model card."""
