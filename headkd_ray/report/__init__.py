"""Output for people: tables, log lines and drawn detections. It reads records and files, never a live run."""
