"""Language models whose mixers are linear attention. Nothing here depends on the insides of kernels or on ranks."""
