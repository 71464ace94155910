"""What is kept: scores, the choice, the plan, and a checkpoint seen through it. Knows no file format."""
