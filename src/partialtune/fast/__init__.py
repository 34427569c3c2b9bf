"""Fast paths: the numbers of the plain path in less time and memory. Each has a test of that, and a switch."""
