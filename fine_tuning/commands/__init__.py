"""The commands a person types; each is thin over the library."""
