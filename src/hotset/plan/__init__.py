"""The planner: from a model, hardware and a workload to a table and a page."""
