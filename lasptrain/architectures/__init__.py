"""What an architecture is, in numbers. No torch."""
