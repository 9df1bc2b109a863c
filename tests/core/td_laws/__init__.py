"""Laws of successor measures and of their temporal-difference losses, none of which needs any training."""
