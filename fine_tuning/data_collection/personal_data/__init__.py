"""Personal data in text: find it, mask it."""
