"""Replies of the models, and their likelihood of the references."""
