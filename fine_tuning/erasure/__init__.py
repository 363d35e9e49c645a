"""Forget conversations: find, rewrite, prove."""
