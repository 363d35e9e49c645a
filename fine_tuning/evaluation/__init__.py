"""Is it better? Metrics, paired comparison and the verdict."""
