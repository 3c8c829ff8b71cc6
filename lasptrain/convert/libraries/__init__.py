"""Libraries that run exports: what their targets have in common."""
