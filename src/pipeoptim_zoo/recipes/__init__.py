"""Recipes: functions that return a complete configuration. A new recipe is a decorated function in a new file here."""
