"""Everything that involves other ranks: mesh, collectives, p2p, scan, sharded recurrence, sharding of the model."""
