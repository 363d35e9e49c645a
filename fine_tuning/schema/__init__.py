"""What the packages exchange: conversations, prepared rows, and how a chat becomes token ids and labels."""
