"""What a recipe costs, from numbers alone. No torch."""
