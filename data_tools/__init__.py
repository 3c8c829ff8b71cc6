"""The text side of the data: sources, tokenizers, and turning text into token shards. Needs no torch."""
