"""Pretrain linear-attention language models on sequences of millions of tokens."""

__version__ = "0.1.0"
