"""Policies of the domains that are trained once and stored with the project, and the command that makes them."""
