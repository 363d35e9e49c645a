"""From clean conversations to token ids, labels and splits."""
