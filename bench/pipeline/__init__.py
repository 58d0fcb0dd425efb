"""Rows that measure several rooms at work together."""
