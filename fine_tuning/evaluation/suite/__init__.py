"""What the models are asked."""
