"""Base models and the adapters trained on them."""
