"""Normalise, filter and deduplicate, shard by shard."""
