"""Proof on a recipe: what `pretrain` computes on a mesh, compared with one process, the definition, and itself."""
