"""The agent that runs inside every sandbox (agent.c) and the host's end of its wire (protocol.py)."""
