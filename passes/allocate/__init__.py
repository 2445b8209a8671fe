"""Passes that search for what others shall do."""
