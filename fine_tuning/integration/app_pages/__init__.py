"""The pages of the chat app, one a module, each with a `page` function."""
