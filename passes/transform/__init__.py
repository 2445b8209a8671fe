"""Rewrites that change how a function is written, to give other passes or the machine a better hold on it."""
