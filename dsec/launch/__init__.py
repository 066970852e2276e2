"""The launch rules: what must hold before any code we do not trust runs (docs/dsec.md lists them)."""
