"""What a run will need before it starts: operations, memory, time, chunk sizes."""
