"""Other ways to share a window, to compare with."""
