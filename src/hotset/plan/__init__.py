"""The arithmetic over bytes and links that the planner, the simulator and the engine share."""
