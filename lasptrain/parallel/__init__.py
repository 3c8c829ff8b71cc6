"""Everything that knows of other ranks: mesh, scan over ranks, attention (kernel and scan), sharding of the model."""
