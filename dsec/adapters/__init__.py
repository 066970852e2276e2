"""Other frameworks' idea of a sandbox, over `AsyncSandbox`. Each file needs that framework and nothing else does."""
