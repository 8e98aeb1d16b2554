"""Model families that only tests know."""
