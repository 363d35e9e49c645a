"""Shards, how logs become shards, and what was forgotten."""
