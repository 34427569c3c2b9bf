"""The syntax of recipes' values, selectors and schedules: checked before anything is loaded."""
