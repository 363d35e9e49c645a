"""What the models answer, and how likely they find what people answered."""
