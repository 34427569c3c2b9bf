"""What a person looks at: figures, report, model card."""
