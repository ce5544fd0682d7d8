"""What a user adds: an environment, a reward, an export. Each file stands alone."""
