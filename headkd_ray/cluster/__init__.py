"""Ray: the only room that imports it. Train workers, data tasks, resources."""
