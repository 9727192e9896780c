"""What the task is: facts, labels, photos, prompt, the answer's grammar, metrics, MORE's files."""
