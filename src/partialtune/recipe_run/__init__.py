"""The whole run of a recipe: from its text to its report."""
