"""Training of LoRA and QLoRA adapters."""
