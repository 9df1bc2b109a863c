"""Helpers without domain knowledge, which every other room may import."""
