"""The recipe: every choice of a run, read from one YAML file and frozen. A section is a class, a key is a field.

A value is right or it is refused, never repaired. Nothing here imports torch.
"""
