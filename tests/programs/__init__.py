"""Programs that run as processes of their own: most are started by tests."""
