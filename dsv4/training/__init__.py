"""Training: optimisers, schedules, losses, the trainer and its checkpoints (report 2.4, 4.2; training spec 1)."""
