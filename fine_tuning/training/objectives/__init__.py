"""Training objectives: what a batch is and what its loss is."""
