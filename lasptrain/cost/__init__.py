"""The cost of a recipe, from numbers alone. No torch."""
