"""Weights that leave for other libraries and come back: tables of names, files, and the proof that logits stayed."""
