"""A package that lasptrain knows nothing of: two recurrences, token by token, and an architecture for each."""
