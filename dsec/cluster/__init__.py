"""The cluster: who runs what. Placement, leases, the watcher and their store; a simulator drives the same code."""
