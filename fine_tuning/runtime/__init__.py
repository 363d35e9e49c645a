"""What runs a model: the base, the hardware, llama.cpp."""
