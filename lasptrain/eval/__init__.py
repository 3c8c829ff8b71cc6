"""Evaluation of trained models: long-context tasks, perplexity on held-out text, generation."""
