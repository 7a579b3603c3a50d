"""Where a shadow lives: shardings, kinds of memory, and transfers between them."""
