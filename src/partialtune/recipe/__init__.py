"""Recipes: flat YAML and command-line words -> checked arguments for every stage."""
