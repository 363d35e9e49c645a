"""One script per DVC stage: params and paths in, library call, outputs and metrics out."""
