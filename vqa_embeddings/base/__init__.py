"""What every room may use, and what knows none of them: files, processes, lines for the user.

files: write a file so that readers never see half of it. file_names: names that are no UTF-8.
child_processes: Python processes that end with this one. process_pool: a `map` in several processes.
console: lines for the user, and reminders of a wait. timings: seconds by stage. environment: its variables.
commands: what the two programs are called, as scripts and installed.
"""
