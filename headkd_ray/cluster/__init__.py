"""Running on Ray: train workers, data tasks, teacher actors and resource checks."""
