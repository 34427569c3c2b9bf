"""Text: sources -> decoded, cleaned texts -> token windows."""
