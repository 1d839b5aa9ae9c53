"""The comparison of finished runs: what differs between them, and what that brings."""
