"""What a sandbox may reach and who may reach it: nothing, unless its policy lists it."""
