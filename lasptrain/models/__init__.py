"""Language models whose mixers are linear attention. Nothing here knows of kernels' insides or of other ranks."""
