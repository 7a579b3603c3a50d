"""What pytest must not collect: programs that tests start as processes of their own."""

collect_ignore = [
    "chosen_devices.py",
    "eight_devices.py",
    "killed_hosts.py",
    "launch.py",
    "long_run.py",
    "many_hosts.py",
    "saving_hosts.py",
    "saving_run.py",
    "sharded_blocks.py",
    "two_processes.py",
    "untrusted_reader.py",
]
