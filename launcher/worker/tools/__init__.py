"""CLI verbs that touch tensors; each module runs as a child process."""
