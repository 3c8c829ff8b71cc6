"""Architectures in numbers. No torch."""
