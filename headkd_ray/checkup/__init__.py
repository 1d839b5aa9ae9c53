"""What is checked of a job before a night is spent on it: its data, its teacher, its sizes, the machine."""
