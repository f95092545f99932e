"""Moving slots between shards while they are written and read (docs/moves.md, docs/decisions/0013-moves.md)."""
