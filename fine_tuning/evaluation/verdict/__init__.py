"""Records of an evaluation in, a decision with its reasons out. No model is loaded here."""
