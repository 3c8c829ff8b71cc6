"""Shards of tokens → windows → this rank's slice. Nothing here communicates; every rank reads for itself."""
