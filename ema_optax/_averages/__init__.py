"""The average: transforms, one fold, the states, and finding and reading them."""
