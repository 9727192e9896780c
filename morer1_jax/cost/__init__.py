"""What a compiled program costs on the machine it was compiled for, read off its optimised HLO."""
