"""What an evaluation writes and how its numbers are computed. No model is loaded here."""
