"""Whetstone: sharpen a local chatbot on its own conversations."""
