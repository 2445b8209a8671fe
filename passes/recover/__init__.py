"""Passes that train what others have made smaller."""
