"""What the commands do, step by step.

An extraction: `launch` (its table, pictures, checkpoint, device and run), `assignment` (which rows this rank is to do),
`plan_summary` (the plan, in words), `extract` (rows to records), `nan_guard` (no row comes out finite), `progress`,
`self_check` (some rows against another implementation).
Around it: `supervise` (a launch from outside), `requeue` (its Slurm job goes on). Afterwards: `merge` (the steps),
`merge_findings` (what is there, and what is to be written), `merge_record` (coverage.json, missing.csv, failed.csv),
`merge_outcome` (what a user is told). `options` holds what was asked for; `demo` brings its own input.
"""
