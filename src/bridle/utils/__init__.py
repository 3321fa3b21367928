"""Independent of the method: files, processes, memory, HTTP, progress."""
