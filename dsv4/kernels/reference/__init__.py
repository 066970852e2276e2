"""Plain torch, forward and backward: the specification of every kernel."""
