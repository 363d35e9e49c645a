"""Serving models to people: Ollama, the embedded engine, the chat app."""
