"""Folders that hold a model, their cards, and pushing them to the Hub."""
