"""What the tests share: seeded draws, comparisons, and models whose answers are known."""
