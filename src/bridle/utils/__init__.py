"""What is no part of the method: files, processes, memory, HTTP, progress."""
