"""One process per host that owns its sandboxes: edge.py (the work), server.py (the socket), pool.py (stock)."""
