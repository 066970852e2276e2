"""Four kinds of sandbox behind one interface (base.py)."""
