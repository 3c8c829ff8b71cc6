"""Language models whose mixers are linear attention. Nothing here depends on kernels' insides or on other ranks."""
