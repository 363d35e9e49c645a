"""What the rooms hand to each other: conversations, prepared rows, and how a chat becomes token ids and labels."""
