"""The formats that other programs export."""
