"""What pytest must not collect: programs that tests start as processes of their own."""

collect_ignore = ["saving_run.py", "two_processes.py"]
