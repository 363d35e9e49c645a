"""Merge, GGUF and Modelfile, and the proof that they say what was trained."""
