"""How a curve is learned: the loss of a step, the epochs, history, checkpoints."""
