"""Mixed precision: what each layer's bits cost in accuracy, and the best choice of bits within a budget."""
