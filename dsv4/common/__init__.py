"""What every room may use: atomic files, the console, metrics.jsonl, counter-based seeds and run configs."""
