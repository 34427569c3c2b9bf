"""Several recipes, or several finished runs, on the same text, windows and seeds: one table, figure and page."""
