"""Several processes as one engine: the driver schedules, and each rank replays what it is sent."""
