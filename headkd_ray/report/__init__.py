"""What people see: tables, log lines, drawn detections. Reads records and files, never a live run."""
