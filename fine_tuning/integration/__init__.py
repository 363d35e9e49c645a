"""Where the models meet people: Ollama, the embedded engine, the chat app."""
