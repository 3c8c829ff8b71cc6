"""The comparisons the README quotes, runnable by anyone."""
