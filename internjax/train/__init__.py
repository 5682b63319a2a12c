"""Training: state, losses, optimizers, the step and the loop around it."""
