"""The freeze plan: what trains, from when on, and why."""
