"""The API server: HTTP in front of a cluster of Edges. Stateless: what it knows is in the store or on an Edge."""
