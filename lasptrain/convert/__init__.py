"""Export of weights to other libraries and back: tables of names, files, and a check that logits are unchanged."""
