"""Does: the operations that instructions name, the interpreter, the workers, and the one-process reference."""
