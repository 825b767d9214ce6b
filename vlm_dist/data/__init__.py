"""From shards to micro-batches: which sample comes when, decoded, as tokens with labels."""
