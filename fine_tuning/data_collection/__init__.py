"""Conversations in: logging, importing, cleaning, exporting."""
