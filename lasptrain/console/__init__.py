"""Terminals, tables, progress."""
