"""What a plan will cost: arithmetic and memory of a step, forecast without weights."""
