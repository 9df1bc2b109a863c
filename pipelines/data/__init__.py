"""Prepared data sets, collected transitions, and the batches that training draws from them."""
